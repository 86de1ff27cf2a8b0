"""The rules of a task as pure functions: each takes a task and a request, and returns a change or raises an error."""
