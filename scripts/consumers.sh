#!/bin/sh
# Runs the tests of the consumers in e2e/consumers against OpenBao and then Vault, or
# against the one that SERVER names.
#
#   SERVER=openbao scripts/consumers.sh [FLAG OF go test]... [PACKAGE]...
#
# Programs that a test needs are built or installed into bin/consumers, once.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() { printf '==> %s\n' "$*"; }
die() { printf 'consumers.sh: %s\n' "$*" >&2; exit 1; }

case ${SERVER:-} in
openbao | vault) servers=$SERVER ;;
'') servers='openbao vault' ;;
*) die "SERVER is $SERVER: use openbao or vault" ;;
esac
[ $# -gt 0 ] || set -- ./...

case " $* " in
*' ./... '* | *' ./clients'*) "$root/scripts/clients.sh" || die "the examples with client libraries could not be set up" ;;
esac

status=0
summary=
for server in $servers; do
	if [ "$server" = vault ]; then
		VAULT_BIN=$("$root/scripts/vault.sh") || die "there is no Vault to test with"
		export VAULT_BIN
	else
		BAO_BIN=$("$root/scripts/bao.sh") || die "there is no OpenBao to test with"
		export BAO_BIN
	fi
	say "Consumers of $server"
	started=$(date +%s)
	result=passed
	(cd "$root/e2e/consumers" && SERVER=$server go test -count=1 -timeout 30m -p 1 "$@") || { result=FAILED; status=1; }
	summary="$summary
==> The consumers' tests $result with $server, in $(($(date +%s) - started)) seconds"
done
echo "$summary"
exit $status
