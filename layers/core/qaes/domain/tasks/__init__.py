"""The rules of a task, pure: each takes a task and a request, and returns a change or raises an error."""
