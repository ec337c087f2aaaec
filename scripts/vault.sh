#!/bin/sh
# Prints the path of a vault binary: $VAULT_BIN, the vault on PATH, or one built from
# source, once, into bin/.
#
#   scripts/vault.sh [present]
#
# With present, it builds nothing, and fails without a message if there is no vault yet.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
case ${1:-} in '' | present) ;; *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac

if [ -n "${VAULT_BIN:-}" ]; then
	[ -x "$VAULT_BIN" ] || { echo "VAULT_BIN is $VAULT_BIN, which is not executable" >&2; exit 1; }
	echo "$VAULT_BIN"
	exit
fi
if command -v vault; then
	exit
fi

# The file name has the version, so a newly required version is built again.
version=$(cd "$root/tools/vault" && go list -m -f '{{.Version}}' github.com/hashicorp/vault)
vault=$root/bin/vault-$version
if [ ! -x "$vault" ]; then
	[ "${1:-}" != present ] || exit 1
	echo "No vault on PATH: building Vault $version from source into bin/." >&2
	echo "This takes about 8 minutes on 2 cores, or half a minute if it is in Go's build cache." >&2
	mkdir -p "$root/bin"
	(cd "$root/tools/vault" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$vault.part" github.com/hashicorp/vault)
	mv "$vault.part" "$vault"
	echo "Built $vault" >&2
fi
echo "$vault"
