#!/bin/sh
# Runs the end-to-end tests in OpenBao and then in Vault, or only in the one that SERVER
# names.
#
#   SERVER=openbao scripts/e2e.sh [FLAG OF go test]...
#
# OpenBao comes first because fetching it takes seconds, while Vault may have to be built.
# If OpenBao is not available, the script continues without it, and says so there and at
# the end. With CI set or SERVER=openbao, it fails instead.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() { printf '==> %s\n' "$*"; }
die() { printf 'e2e.sh: %s\n' "$*" >&2; exit 1; }

case ${SERVER:-} in
openbao | vault) servers=$SERVER ;;
'') servers='openbao vault' ;;
*) die "SERVER is $SERVER: use openbao or vault" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
status=0
for server in $servers; do
	if [ "$server" = vault ]; then
		bin=$("$root/scripts/vault.sh") || die "no Vault to test in"
		export VAULT_BIN="$bin"
	elif bin=$("$root/scripts/bao.sh"); then
		export BAO_BIN="$bin"
	else
		[ -z "${SERVER:-}${CI:-}" ] || die "no OpenBao to test in"
		say "NOT TESTED in OpenBao: not available (see the message of bao.sh above)" | tee -a "$work/summary"
		continue
	fi
	version=$("$bin" version | awk '{ sub(/,$/, "", $2); print $1, $2; exit }')
	say "End-to-end tests in $version"
	started=$(date +%s)
	result=passed
	# Tests that take minutes and do not depend on the server run in the last one only.
	next=${servers#*"$server"}
	next=${next# }
	# Without a list of packages, go test shows output while the tests run.
	(cd "$root/e2e" && SERVER=$server E2E_UNTESTED=$work/$server E2E_NEXT=$next go test -count=1 -timeout 20m -parallel 8 "$@") || result=FAILED
	[ "$result" = passed ] || status=1
	say "The end-to-end tests $result in $version after $(($(date +%s) - started)) seconds" >>"$work/summary"
	[ ! -f "$work/$server" ] || cat "$work/$server" >>"$work/summary"
done
echo
cat "$work/summary"
exit $status
