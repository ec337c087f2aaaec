#!/bin/sh
# Registers a plugin binary in a running Vault, and enables it or upgrades the
# mount that is there.
#
#   VAULT_ADDR=... VAULT_TOKEN=... scripts/register.sh BINARY [MOUNT]
#
# BINARY is a file in the plugin_directory of the Vault server, as seen from
# here; MOUNT is where to enable it, by default mojoauth. The token needs sudo on
# sys/plugins/catalog/secret/vault-plugin-secrets-mojoauth, and may manage mounts.
# The version is the one that the binary tells.
set -eu

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
binary=$1
mount=${2:-mojoauth}
mount=${mount%/}
name=vault-plugin-secrets-mojoauth
vault=${VAULT_BIN:-vault}

[ -x "$binary" ] || { echo "register.sh: $binary is not a program" >&2; exit 1; }
version=$("$binary" -version | awk '{ print $2 }')
if command -v sha256sum >/dev/null; then
	sum=$(sha256sum "$binary")
else
	sum=$(shasum -a 256 "$binary")
fi
sum=${sum%% *}

# The table's first columns are the path and the type.
type=$("$vault" secrets list | awk -v path="$mount/" '$1 == path { print $2 }')
case $type in
'' | "$name") ;;
*)
	echo "register.sh: at $mount/ is an engine of the type $type: name another MOUNT" >&2
	exit 1
	;;
esac

"$vault" plugin register -sha256="$sum" -version="$version" -command="$(basename "$binary")" secret "$name"
if [ -n "$type" ]; then
	"$vault" secrets tune -plugin-version="$version" "$mount/"
	# Not `vault plugin reload -mounts`: of 1.21.0 it asks for a path that is not there.
	"$vault" write sys/plugins/reload/backend mounts="$mount/"
else
	"$vault" secrets enable -path="$mount" -plugin-version="$version" "$name"
fi
