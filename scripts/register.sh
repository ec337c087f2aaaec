#!/bin/sh
# Registers a plugin binary in a running Vault or OpenBao, and enables it or upgrades an
# existing mount.
#
#   VAULT_ADDR=... VAULT_TOKEN=... scripts/register.sh SUM BINARY [MOUNT]
#   BAO_ADDR=...   BAO_TOKEN=...   scripts/register.sh SUM BINARY [MOUNT]
#
# SUM is the binary's expected SHA-256, from where it was built or verified: 64
# hexadecimal digits, or a file in the format of sha256sum that lists the binary.
# BINARY is a file in the server's plugin_directory, as seen from here. MOUNT is where to
# enable the plugin (default: mojoauth). The token must have sudo on
# sys/plugins/catalog/secret/vault-plugin-secrets-mojoauth and permission to manage mounts.
#
# The script runs the command that VAULT_BIN or BAO_BIN names. Without them, it runs bao if
# BAO_ADDR is set and VAULT_ADDR is not, and vault otherwise, or whichever is on PATH.
#
# The version is the one that the binary reports. The script runs the binary only if its
# checksum matches, and with an empty environment.
set -eu

usage() { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { printf 'register.sh: %s\n' "$*" >&2; exit 1; }
[ $# -ge 2 ] && [ $# -le 3 ] || usage
binary=$2
mount=${3:-mojoauth}
mount=${mount%/}
name=vault-plugin-secrets-mojoauth

have() { command -v "$1" >/dev/null; }
vault=${VAULT_BIN:-${BAO_BIN:-}}
if [ -n "$vault" ]; then
	have "$vault" || die "$vault is not executable"
else
	vault=vault other=bao
	[ -z "${BAO_ADDR:-}" ] || [ -n "${VAULT_ADDR:-}" ] || vault=bao other=vault
	have "$vault" || vault=$other
	have "$vault" || die "neither vault nor bao is on PATH: set VAULT_BIN or BAO_BIN"
fi

case $binary in */*) ;; *) binary=./$binary ;; esac # never the one on PATH
[ -f "$binary" ] && [ -x "$binary" ] || die "$2 is not an executable file"
file=$(basename "$binary")

case $1 in
*[!0-9a-fA-F]* | '')
	[ -f "$1" ] || die "$1 is neither a SHA-256 nor a file of checksums"
	# The name may have a * in front, for a binary file.
	expected=$(awk -v file="$file" '{ name = $2; sub(/^\*/, "", name); if (name == file) print $1 }' "$1")
	[ -n "$expected" ] || die "$1 has no checksum of $file"
	;;
*) expected=$1 ;;
esac
expected=$(printf %s "$expected" | tr A-F a-f)
case $expected in
*[!0-9a-f]*) die "$1 does not have one SHA-256 of $file" ;;
esac
[ ${#expected} -eq 64 ] || die "a SHA-256 has 64 hexadecimal digits, but $expected has ${#expected}"

if command -v sha256sum >/dev/null; then
	sum=$(sha256sum <"$binary")
else
	sum=$(shasum -a 256 <"$binary")
fi
sum=${sum%% *}
[ "$sum" = "$expected" ] || die "$binary has the SHA-256 $sum, not $expected: it was not run, and not registered"

version=$(env -i "$binary" -version | awk '{ print $2 }')
case $version in
v[0-9]*) ;;
*) die "$binary does not report a version" ;;
esac

# The table's first columns are the path and the type.
type=$("$vault" secrets list | awk -v path="$mount/" '$1 == path { print $2 }')
case $type in
'' | "$name") ;;
*) die "$mount/ has an engine of type $type: choose another MOUNT" ;;
esac

"$vault" plugin register -sha256="$expected" -version="$version" -command="$file" secret "$name"
if [ -n "$type" ]; then
	"$vault" secrets tune -plugin-version="$version" "$mount/"
	# `vault plugin reload -mounts` in Vault 1.21.0 requests a path that does not exist. The
	# scope is global because OpenBao's standbys run the plugin too.
	"$vault" write sys/plugins/reload/backend mounts="$mount/" scope=global
else
	"$vault" secrets enable -path="$mount" -plugin-version="$version" "$name"
fi
