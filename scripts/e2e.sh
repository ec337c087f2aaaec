#!/bin/sh
# Runs the end-to-end tests in OpenBao and then in Vault, or in the one that SERVER names.
#
#   SERVER=openbao scripts/e2e.sh [FLAG OF go test]...
#
# OpenBao comes first, since it is there in seconds, while a Vault may have to be built.
# Where OpenBao cannot be had, it says so, at its end too, and goes on. When CI is set, or
# SERVER asks for OpenBao, that is a failure.
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
		bin=$("$root/scripts/vault.sh") || die "there is no Vault to test in"
		export VAULT_BIN="$bin"
	elif bin=$("$root/scripts/bao.sh"); then
		export BAO_BIN="$bin"
	else
		[ -z "${SERVER:-}${CI:-}" ] || die "there is no OpenBao to test in"
		say "NOT TESTED in OpenBao: there is none, as bao.sh says above" | tee -a "$work/summary"
		continue
	fi
	version=$("$bin" version | awk '{ sub(/,$/, "", $2); print $1, $2; exit }')
	say "End-to-end tests in $version"
	started=$(date +%s)
	result=passed
	# What takes minutes and says nothing about the server is tested in the last one.
	next=${servers#*"$server"}
	next=${next# }
	# Without a list of packages go test shows what is printed while it runs.
	(cd "$root/e2e" && SERVER=$server E2E_UNTESTED=$work/$server E2E_NEXT=$next go test -count=1 -timeout 20m -parallel 8 "$@") || result=FAILED
	[ "$result" = passed ] || status=1
	say "The end-to-end tests $result in $version, in $(($(date +%s) - started)) seconds" >>"$work/summary"
	[ ! -f "$work/$server" ] || cat "$work/$server" >>"$work/summary"
done
echo
cat "$work/summary"
exit $status
