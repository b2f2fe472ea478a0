"""A package in a folder whose `__init__` files must not be run."""

from pathlib import Path


def write_checkout(folder: Path) -> None:
    (folder / "lora").mkdir(parents=True)
    for init in (folder / "__init__.py", folder / "lora" / "__init__.py"):
        init.write_text("raise RuntimeError('a whole server')\n")
    (folder / "lora" / "helpers.py").write_text("def double(x):\n    return x\n")
    (folder / "lora" / "ops.py").write_text(
        "from fakepeer import envs\n"
        "from fakepeer.lora.helpers import double\n"
        "def scaled(x):\n    return envs.SETTING * double(x)\n"
    )
