"""Print the key of every kernel, imported and met in orders that the first argument seeds: for test_cache_keys."""

import importlib
import json
import pkgutil
import random
import sys

from triton.runtime.jit import JITFunction

order = random.Random(int(sys.argv[1]))
modules = [
    module.name
    for package in ("flash_attn_plus.kernels.triton", "flash_attn_plus.kernels.gluon")
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
]
order.shuffle(modules)
found = {}
for name in modules:
    for attribute, value in vars(importlib.import_module(name)).items():
        if isinstance(value, JITFunction) and attribute.endswith("_kernel"):
            found[f"{name}.{attribute}"] = value
names = sorted(found)
order.shuffle(names)
print(json.dumps({name: found[name].cache_key for name in names}))
