"""What a module is made of and what can be attached to it, from one batch: ``inspect``.

`found` has the findings as plain values, `look` finds them with `runs` and `structure`, and
`sections` and `page` show them. Nothing here needs more than the package does.
"""

from lightning_aux.inspection.found import Binding, Inspection, Leaf, Member, ModuleFound, Shape
from lightning_aux.inspection.look import inspect

__all__ = ["Binding", "Inspection", "Leaf", "Member", "ModuleFound", "Shape", "inspect"]
