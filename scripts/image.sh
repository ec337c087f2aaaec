#!/bin/sh
# Builds the plugin's image for Vault and OpenBao, and writes it to dist/ for
# `docker load`.
#
#   VERSION=0.1.0-dev scripts/image.sh          from this source
#   scripts/image.sh ARCHIVE.zip                from the binary in a release archive
#
# Verify the archive first, as the README shows.
#
# The script uses the first of buildah, podman and docker that is installed, or the one
# that ENGINE names; buildah needs no daemon and no network. IMAGE_ARCH is amd64 or arm64
# (default: this machine's). IMAGE is the image's name.
#
# CA_BUNDLE is the file with the certificate authorities that the image trusts (default:
# this machine's). Authorities change independently of the plugin, so a release does not
# contain them; a label of the image has the bundle's checksum.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
name=vault-plugin-secrets-mojoauth

say() { printf '==> %s\n' "$*"; }
die() { printf 'image.sh: %s\n' "$*" >&2; exit 1; }

archive=
case $# in
0) ;;
1) archive=$(CDPATH='' cd -- "$(dirname -- "$1")" && pwd)/$(basename -- "$1") ;;
*) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
cd "$root"

engine=${ENGINE:-}
for candidate in buildah podman docker; do
	[ -n "$engine" ] || ! command -v "$candidate" >/dev/null || engine=$candidate
done
command -v "${engine:-none}" >/dev/null || die "install buildah, podman or docker"

bundle=${CA_BUNDLE:-}
for candidate in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
	[ -n "$bundle" ] || [ ! -f "$candidate" ] || bundle=$candidate
done
grep -qs 'BEGIN CERTIFICATE' "${bundle:-none}" || die "no certificate authorities found: set CA_BUNDLE to their file"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
context=$work/context
mkdir "$context"
if [ -n "$archive" ]; then
	# NAME_<version>_linux_<arch>.zip
	IFS=_ read -r _ version os arch <<-TXT
		$(basename "$archive" .zip)
	TXT
	[ "$os" = linux ] || die "$archive is not for linux"
	# The archive may come from any source. A link in it would make the commands below read
	# and write outside the directory.
	contents=$(unzip -Z1 "$archive" | LC_ALL=C sort) || die "$archive cannot be read"
	[ "$contents" = "LICENSE.txt
$name" ] || die "$archive must contain only LICENSE.txt and $name"
	[ "$(unzip -Z "$archive" | grep -c '^-')" -eq 2 ] || die "$archive contains something other than files"
	unzip -q "$archive" -d "$context"
	for file in LICENSE.txt "$name"; do
		[ -f "$context/$file" ] && [ ! -h "$context/$file" ] || die "$file in $archive is not a file"
	done
else
	version=${VERSION:?is not set}
	arch=${IMAGE_ARCH:-$(go env GOHOSTARCH)}
	say "Building $name $version for linux/$arch"
	GOOS=linux GOARCH=$arch make --no-print-directory -s build VERSION="$version" OUT="$context/$name"
	cp LICENSE "$context/LICENSE.txt"
fi
# The same binary and authorities give the same image: its time is the commit's, which the
# files in a release archive have as well.
if [ -n "$archive" ]; then
	time=$(stat -c %Y "$context/LICENSE.txt")
else
	time=$(git show -s --format=%ct HEAD)
fi
cp "$bundle" "$context/ca-certificates.crt"
chmod 755 "$context/$name"
chmod 644 "$context/LICENSE.txt" "$context/ca-certificates.crt"
find "$context" -exec touch -h -d "@$time" {} +
sum=$(sha256sum "$context/ca-certificates.crt")
# Vault uses the tag without v, OpenBao the one with it.
image=${IMAGE:-$name}:$version
prefixed=${IMAGE:-$name}:v$version
label=org.opencontainers.image
set -- --platform "linux/$arch" --file Containerfile \
	--label "$label.title=$name" \
	--label "$label.description=Vault secrets engine for MojoAuth machine-to-machine applications" \
	--label "$label.version=$version" \
	--label "$label.source=https://github.com/mojoauth/$name" \
	--label "$label.licenses=MPL-2.0" \
	--label "com.mojoauth.ca-bundle.sha256=${sum%% *}" \
	--tag "$image" --tag "$prefixed"

file=dist/${name}_${version}_linux_$arch.image.tar
mkdir -p dist
rm -f "$file"
say "Building the image $image with $engine"
# Use the OCI format, even for Docker: in Docker's own format, the name of the build
# container is part of the image.
case $engine in
buildah)
	buildah build --isolation chroot --format oci --identity-label=false --timestamp "$time" "$@" "$context"
	buildah push --quiet "$image" "docker-archive:$work/archive.tar:$image"
	# buildah omits the second tag.
	mkdir "$work/archive"
	tar -xf "$work/archive.tar" -C "$work/archive"
	chmod u+w "$work/archive/manifest.json"
	sed -i "s|\"\([^\"]*\):$version\"|&,\"\1:v$version\"|g" "$work/archive/manifest.json"
	(cd "$work/archive" && tar --sort name --owner 0 --group 0 --mtime "@$time" -cf "$root/$file" -- *)
	;;
podman)
	podman build --format oci --timestamp "$time" "$@" "$context"
	podman save --quiet --format docker-archive --output "$file" "$image" "$prefixed"
	;;
docker)
	SOURCE_DATE_EPOCH=$time docker build "$@" "$context"
	docker save --output "$file" "$image" "$prefixed"
	;;
*) die "ENGINE is $engine: use buildah, podman or docker" ;;
esac
# This is the image ID that `docker load` shows. Vault needs it as the plugin's checksum;
# OpenBao needs the binary's checksum.
id=$(tar -xOf "$file" manifest.json | sed 's|.*"Config":"\(blobs/sha256/\)\{0,1\}\([0-9a-f]*\).*|\2|')
binary=$(sha256sum "$context/$name")
say "Image $image and $prefixed"
say "SHA-256 for Vault, the image's ID: $id"
say "SHA-256 for OpenBao, the binary's: ${binary%% *}"
say "For docker load: $file"
