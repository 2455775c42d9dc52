"""The controller: it learns from all pods and pushes decision tables; it never sits in a request's path."""
