"""The vLLM KV connector: selection, coding and transfer of KV caches between pods."""
