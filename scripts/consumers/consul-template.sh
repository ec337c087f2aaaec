#!/bin/sh
# Prints the path of consul-template. The first run builds the version that
# tools/consul-template pins from source into bin/consumers/.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

# The file name contains the version, so a new pin causes a new build.
version=$(cd "$root/tools/consul-template" && go list -m -f '{{.Version}}' github.com/hashicorp/consul-template)
program=$root/bin/consumers/consul-template-$version
if [ ! -x "$program" ]; then
	echo "Building consul-template $version into bin/consumers/; the first time this takes about a minute on 2 cores." >&2
	mkdir -p "$root/bin/consumers"
	(cd "$root/tools/consul-template" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$program.part" github.com/hashicorp/consul-template)
	mv "$program.part" "$program"
	echo "Built $program" >&2
fi
echo "$program"
