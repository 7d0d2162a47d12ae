"""Run an unedited DeepSpeed script on our engine.

    deepspeed --module dualpipe_engine.run train.py --deepspeed_config ds.json

`deepspeed.initialize` becomes `dualpipe_engine.initialize` for the script; its arguments, `--local_rank` included, are
passed on. A script that makes a PipelineEngine itself is told so.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .errors import ConfigError, PlanError


def main() -> None:
    """Run the script named in `sys.argv`; exit code 2 and one sentence when the configuration cannot work."""
    arguments = sys.argv[1:]
    script = next((word for word in arguments if not word.startswith("-")), None)
    if script is None or not Path(script).is_file():
        sys.exit(f"usage: deepspeed --module dualpipe_engine.run SCRIPT.py [ARGUMENTS]; there is no script {script!r}")
    arguments.remove(script)
    import deepspeed

    from .engine.initialize import initialize, refuse_other_engines

    deepspeed.initialize = initialize
    refuse_other_engines()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except (ConfigError, PlanError) as error:
        print(f"dualpipe_engine: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
