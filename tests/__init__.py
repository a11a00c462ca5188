"""What the project promises, as tests; `bench` measures it and `claims` repeats its studies."""
