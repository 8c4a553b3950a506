"""`python FOLDER ARGUMENTS` where `import rdtrain` fails, in a process that process_server.py has forked, which has imported it."""

import runpy
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "rdtrain"]:
    del sys.modules[name]
sys.modules["rdtrain"] = None
try:
    import rdtrain
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    sys.exit(f"rdtrain is there: {rdtrain}")
