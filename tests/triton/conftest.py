from effkern.backends import choice

# These run inside the process that test_interpreter.py starts.
collect_ignore = (
    []
    if choice.triton_interprets()
    else [
        "test_bytes_and_launches.py",
        "test_norm_softmax.py",
        "test_numerics.py",
        "test_step_on_device.py",
        "test_storage_and_clipping.py",
    ]
)
