#!/usr/bin/env bash
# Check style (ruff), types (mypy) and shell syntax: scripts/lint.sh [PYTHON], by default that of .venv-test.
set -euo pipefail
python=${1:-}
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
: "${python:=$root/.venv-test/bin/python}"
[ -x "$python" ] || fail "$python is missing; run scripts/test.sh once, or name a Python that has ruff and mypy"

# mypy cannot map folders to packages as the build does, so it is shown the tree that users import.
tree=build/typecheck/apar
mkdir -p "$tree"
for name in export runtime plugins; do
  ln -sfn "../../../$name" "$tree/$name"
done
ln -sfn ../../../plugins/cmake/package_init.py.in "$tree/__init__.py"

status=0
for script in scripts/*.sh .ci/run; do
  bash -n "$script" || status=1
done
say "ruff check"
"$python" -m ruff check -q . || status=1
say "ruff format"
"$python" -m ruff format -q --check . || status=1
say "mypy"
"$python" -m mypy --cache-dir build/mypy --no-error-summary -p apar || status=1
shopt -s nullglob
programs=(scripts/*.py)
if [ ${#programs[@]} -gt 0 ]; then
  MYPYPATH=scripts "$python" -m mypy --cache-dir build/mypy --no-error-summary "${programs[@]}" || status=1
fi
# Triton's stub puts the folder of a model on the search path.
MYPYPATH=triton_repo/apar/1 "$python" -m mypy --cache-dir build/mypy --no-error-summary triton_repo/apar/1/model.py || status=1
exit $status
