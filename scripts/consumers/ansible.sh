#!/bin/sh
# Prints the directory that contains the Ansible commands. The first run installs the Ansible
# version that tools/ansible pins into a virtual environment in bin/consumers/.
#
# pip verifies every package's hash. The script installs nothing outside bin/consumers/.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { printf 'ansible.sh: %s\n' "$*" >&2; exit 1; }

# The directory name contains the version, so a new pin causes a new installation.
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
	"$python" -m venv "$env" || die "Python cannot create a virtual environment: install its venv module"
	"$env/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: \
		--require-hashes --requirement "$requirements" >&2 || die "pip could not install Ansible $version"
	touch "$env/installed"
	say "Installed $env"
fi
echo "$env/bin"
