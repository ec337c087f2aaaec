#!/bin/sh
# Prints the directory with the commands of the Ansible that tools/ansible pins, installed
# once, with pip, into a virtual environment in bin/consumers/.
#
# pip checks every package's hash. Nothing is installed outside bin/consumers/.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { printf 'ansible.sh: %s\n' "$*" >&2; exit 1; }

# Installed again when another version is pinned; the name says which one it is.
requirements=$root/tools/ansible/requirements.txt
version=$(sed -n 's/^ansible==\([0-9.]*\).*/\1/p' "$requirements")
env=$root/bin/consumers/ansible-$version
if [ ! -f "$env/installed" ]; then
	python=$(python3 -c 'import sys; print(sys.executable if sys.version_info >= (3, 11) else "")' 2>/dev/null) || python=
	[ -n "$python" ] || die "Ansible $version needs Python 3.11 or later"
	say "Installing Ansible $version with its collections into bin/consumers/ (550 MB); this takes about 2 minutes."
	rm -rf "$env"
	mkdir -p "$root/bin/consumers"
	echo 'module consumers' >"$root/bin/consumers/go.mod" # no package of this project is below
	"$python" -m venv "$env" || die "Python cannot make a virtual environment: install its venv module"
	"$env/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: \
		--require-hashes --requirement "$requirements" >&2 || die "pip could not install Ansible $version"
	touch "$env/installed"
	say "Installed $env"
fi
echo "$env/bin"
