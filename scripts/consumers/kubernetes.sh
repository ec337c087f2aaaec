#!/bin/sh
# Prints the paths of etcd, kube-apiserver, external-secrets, and the directory with the
# custom resource definitions of external-secrets, one per line. The first run builds the
# programs from source into bin/consumers/. The modules in e2e/consumers/kubernetes pin their
# versions.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
modules=$root/e2e/consumers/kubernetes
out=$root/bin/consumers

say() { printf '%s\n' "$*" >&2; }

# build NAME MODULE PACKAGE MINUTES [LINKER FLAG]...: builds a program from a module in
# e2e/consumers/kubernetes and prints its path. The file name contains the version, so a new
# pin causes a new build.
build() {
	name=$1 module=$2 package=$3 minutes=$4
	shift 4
	program=$out/$name-$(version "$name" "$module")
	if [ ! -x "$program" ]; then
		say "Building ${program##*/} into bin/consumers/; the first time this takes about $minutes on 2 cores."
		mkdir -p "$out"
		(cd "$modules/$name" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w $*" -o "$program.part" "$package")
		mv "$program.part" "$program"
		say "Built $program"
	fi
	echo "$program"
}

version() { (cd "$modules/$1" && go list -m -f '{{.Version}}' "$2"); }

build etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3 "2 minutes"

# The API server doesn't start without a version.
kubernetes=$(version kube-apiserver k8s.io/kubernetes)
minor=${kubernetes#v1.}
set=-X=k8s.io/component-base/version
build kube-apiserver k8s.io/kubernetes k8s.io/kubernetes/cmd/kube-apiserver "4 minutes" \
	"$set.gitVersion=$kubernetes" "$set.gitMajor=1" "$set.gitMinor=${minor%%.*}"

operator=github.com/external-secrets/external-secrets
definitions=$out/external-secrets-$(version external-secrets $operator)-crds
build external-secrets $operator $operator "5 minutes"
if [ ! -d "$definitions" ]; then
	source=$(cd "$modules/external-secrets" && go list -m -f '{{.Dir}}' $operator)
	mkdir -p "$definitions.part"
	cp "$source"/config/crds/bases/*external-secrets.io_*.yaml "$definitions.part/"
	chmod -R u+w "$definitions.part"
	mv "$definitions.part" "$definitions"
fi
echo "$definitions"
