"""Print the key of every kernel, met in the order that the first argument seeds: a script for test_cache_keys."""

import importlib
import json
import pkgutil
import random
import sys

from triton.runtime.jit import JITFunction

found = {}
for name in ("flash_attn_plus.kernels.triton", "flash_attn_plus.kernels.gluon"):
    for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
        for attribute, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and attribute.endswith("_kernel"):
                found[f"{module.name}.{attribute}"] = value
names = sorted(found)
random.Random(int(sys.argv[1])).shuffle(names)
print(json.dumps({name: found[name].cache_key for name in names}))
