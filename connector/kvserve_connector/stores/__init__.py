"""KV of prompt prefixes in stores that outlive an engine: what it is called, where it lies, and how it is read back."""
