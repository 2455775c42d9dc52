"""The main job, `make demo`: from `kubectl apply` to compressed transfers between two vLLM pods."""
