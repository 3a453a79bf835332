"""How torch treats compiled code now, for the whole process."""

import sys


def stance() -> str:
    """The name of the stance of torch's compiler: "default" unless somebody has set another one."""
    # torch has no public way to ask; it imports its compiler when it is first needed, and nothing was set before
    module = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if module is None else str(module._stance.stance)
