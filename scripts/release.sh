#!/bin/sh
# Makes a release in steps. The workflow "release" runs each step in a job that has only
# what the step needs: the build job has no key, and the signing job runs gpg and nothing
# that was downloaded. `make release` runs all steps on this machine.
#
#   VERSION=0.1.0-dev scripts/release.sh snapshot
#   scripts/release.sh check v0.1.0
#   scripts/release.sh build v0.1.0
#   GPG_FINGERPRINT=... scripts/release.sh sign v0.1.0
#   GITHUB_TOKEN=... scripts/release.sh publish v0.1.0
#   scripts/release.sh notes 0.1.0
#
# snapshot builds everything into dist/ and publishes nothing. It signs with the key
# GPG_FINGERPRINT, if set. The other steps release the named tag, vX.Y.Z. check verifies
# that the tag can be released: it is checked out, and is on main. build builds the files
# into dist/ with goreleaser, as described in .goreleaser.yaml. sign signs their checksums
# with the key in release-key.asc, with which users verify them. publish uploads
# everything as a draft with gh. notes prints a version's section of CHANGELOG.md.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
name=vault-plugin-secrets-mojoauth

say() { printf '==> %s\n' "$*"; }
die() { printf 'release.sh: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# notes VERSION: prints the text between "## VERSION" and the next "## ", without
# surrounding blank lines.
notes() {
	awk -v version="$1" '
		/^## / { found = $2 == version; next }
		found && (NF || text) { text = text $0 "\n" }
		END { sub(/\n+$/, "\n", text); printf "%s", text }' CHANGELOG.md
}

# goreleaser finds the sbom program on PATH.
make_files() {
	started=$(date +%s)
	PATH=$root/bin:$PATH bin/goreleaser release --clean --skip=publish "$@"
	say "In dist/, after $(($(date +%s) - started)) seconds:"
	(cd dist && ls -- *.zip *.cdx.json *_SHA256SUMS)
}

# check TAG: sets version.
check() {
	tag=$1
	printf '%s\n' "$tag" | grep -Eqx 'v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.]+)?' || die "the tag is $tag, want vX.Y.Z"
	version=${tag#v}
	commit=$(git rev-parse --quiet --verify "refs/tags/$tag^{commit}") || die "there is no tag $tag"
	[ "$commit" = "$(git rev-parse HEAD)" ] || die "$tag is not checked out"
	git merge-base --is-ancestor "$commit" refs/remotes/origin/main ||
		die "$tag is not on origin/main: only reviewed commits are released"
	[ -z "$(git status --porcelain)" ] || die "there are uncommitted changes"
	[ -f release-key.asc ] || die "release-key.asc is missing: users verify the signature with it"
	[ "$(keys pub)" = 1 ] || die "release-key.asc must contain exactly one key"
	[ -n "$(notes "$version")" ] || die "CHANGELOG.md has no section \"## $version\""
}

# keys KIND: prints the number of records of that kind in release-key.asc.
keys() { gpg --batch --with-colons --show-keys release-key.asc | awk -F: -v kind="$1" '$1 == kind { n++ } END { print n + 0 }'; }

# sums VERSION: checks that dist/ has exactly the files in its checksums.
sums() {
	sums=dist/${name}_$1_SHA256SUMS
	[ -f "$sums" ] || die "$sums is missing: run scripts/release.sh build v$1 first"
	(cd dist && sha256sum --check --quiet --strict "${sums#dist/}") || die "a file in dist/ does not match $sums"
	listed=$(awk '{ sub(/^\*/, "", $2); print $2 }' "$sums" | LC_ALL=C sort)
	there=$(cd dist && for file in *.zip *.cdx.json; do printf '%s\n' "$file"; done | LC_ALL=C sort)
	[ "$listed" = "$there" ] || die "dist/ has other files than $sums"
}

# signed VERSION: checks the checksums' signature with the key in release-key.asc.
signed() {
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	gpg --batch --quiet --dearmor --output "$work/key.gpg" release-key.asc
	gpgv --quiet --keyring "$work/key.gpg" "dist/${name}_$1_SHA256SUMS.sig" "dist/${name}_$1_SHA256SUMS" ||
		die "the checksums are not signed with the key in release-key.asc"
}

sign() {
	signature=dist/${name}_$1_SHA256SUMS.sig
	rm -f "$signature"
	gpg --batch --local-user "$GPG_FINGERPRINT" --output "$signature" --detach-sign "dist/${name}_$1_SHA256SUMS"
}

case ${1:-} in
notes)
	[ $# = 2 ] || usage
	notes "$2"
	;;
snapshot)
	[ $# = 1 ] || usage
	: "${VERSION:?is not set}"
	export VERSION
	if [ -n "$(git status --porcelain)" ]; then
		say "This snapshot includes uncommitted changes"
	fi
	say "Building version $VERSION for 8 platforms: about 10 minutes on 2 cores, or one if it is in Go's build cache"
	make_files --snapshot
	if [ -n "${GPG_FINGERPRINT:-}" ]; then
		sign "$VERSION"
	else
		say "No GPG_FINGERPRINT: the checksums are not signed"
	fi
	;;
check)
	[ $# = 2 ] || usage
	check "$2"
	say "$tag can be released"
	;;
build)
	[ $# = 2 ] || usage
	check "$2"
	say "Building $tag for 8 platforms"
	# Otherwise goreleaser chooses a tag, and the commit may have two.
	export GORELEASER_CURRENT_TAG="$tag" VERSION="$version"
	make_files
	;;
sign)
	[ $# = 2 ] || usage
	check "$2"
	: "${GPG_FINGERPRINT:?is not set}"
	gpg --batch --with-colons --show-keys release-key.asc | awk -F: '$1 == "fpr" { print $10 }' |
		grep -qx "$GPG_FINGERPRINT" || die "$GPG_FINGERPRINT is not the key in release-key.asc"
	sums "$version"
	sign "$version"
	signed "$version"
	say "Signed $sums"
	;;
publish)
	[ $# = 2 ] || usage
	check "$2"
	: "${GITHUB_TOKEN:?is not set}"
	sums "$version"
	signed "$version"
	set -- --draft --verify-tag --title "$tag" --notes-file -
	case $version in *-*) set -- "$@" --prerelease ;; esac
	say "Uploading $tag as a draft"
	notes "$version" | gh release create "$tag" --repo "mojoauth/$name" "$@" dist/*.zip dist/*.cdx.json "$sums" "$sums.sig"
	;;
*) usage ;;
esac
