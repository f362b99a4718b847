from effkern.backends import choice

# These two run inside the process that test_interpreter.py starts.
collect_ignore = (
    [] if choice.triton_interprets() else ["test_bytes_and_launches.py", "test_numerics.py"]
)
