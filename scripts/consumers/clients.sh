#!/bin/sh
# Sets up the examples with client libraries in bin/consumers/. For each new or changed
# example, runs the command in the column "Set up, once" of examples/README.md.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
cd "$root"

say() { printf '%s\n' "$*" >&2; }

mkdir -p bin/consumers
echo 'module consumers' >bin/consumers/go.mod # no package of this project is below
failed=
# The format of a row: | Language: [Library](folder/file) version | needs | `set up` | `run` |
while IFS='`' read -r head setup _; do
	name=${head#*](}
	name=${name%%/*}
	case $setup in
	*' npm '*) tool=npm ;;
	*' mvn '*) tool=mvn ;;
	*) tool=${setup%% *} ;;
	esac
	stamp=bin/consumers/.$name.set-up
	sum=$({ echo "$setup"; find "examples/$name" -type f -exec cksum {} + | sort -k 3; } | cksum)
	if [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then
		continue
	fi
	if ! command -v "$tool" >/dev/null; then
		say "$name: not set up, because $tool is not on PATH"
		continue
	fi
	say "Setting up $name in bin/consumers/; this takes 5 to 90 seconds."
	rm -rf "bin/consumers/$name" "$stamp"
	started=$(date +%s)
	if sh -c "$setup" </dev/null >&2; then
		echo "$sum" >"$stamp"
		say "Set up $name in $(($(date +%s) - started)) seconds"
	else
		say "Setting up $name FAILED: $setup"
		failed=1
	fi
done <<ROWS
$(grep '^| [A-Za-z.]*: \[.*| `.*` | `.*` |$' examples/README.md)
ROWS
[ -z "$failed" ]
