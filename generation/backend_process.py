"""What a process has one of, however many copies of this code are loaded into it.

A package and the folders of two drafters are three copies, each with module-level variables of its own. Of what belongs
to the whole process, such as torch's default generator or what transformers runs as "sdpa", two copies would each keep
a state of their own, and put back what the other one had put there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

ROOM = "_specformer_process_wide"


def shared(name: str, make: Callable[[], object]):
    """The one object of this process under `name`: what `make()` gave the copy that asked first.

    Copies of different age may share it, so it is made of Python's own types, and takes another name when its meaning
    changes.
    """
    room = sys.modules.setdefault(ROOM, ModuleType(ROOM, __doc__))
    return vars(room).setdefault(name, make())
