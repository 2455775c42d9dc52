"""The operator: watches KVServePolicies, plans, and applies profiling Jobs and conditions."""
