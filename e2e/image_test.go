// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// zipped is an entry of an archive.
type zipped struct {
	name    string
	content string // for a link, its target
	mode    fs.FileMode
}

func writeZip(t *testing.T, file string, entries ...zipped) {
	t.Helper()
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	writer := zip.NewWriter(out)
	for _, e := range entries {
		header := &zip.FileHeader{Name: e.name}
		header.SetMode(e.mode)
		w, err := writer.CreateHeader(header)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
}

// scripts/image.sh accepts a release archive from any source, and writes nothing outside
// its own directory, whatever the archive contains.
func TestImageScriptTakesOnlyFiles(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"unzip", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			harness.Missing(t, "%s is not on PATH; not testing scripts/image.sh", tool)
		}
	}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	const precious = "precious"
	plugin := zipped{pluginName, "binary", 0o755}
	license := zipped{"LICENSE.txt", "license", 0o644}
	for name, c := range map[string]struct {
		entries func(victim string) []zipped
		text    string
	}{
		// The engine named here does not build images: it makes the script stop at the
		// end.
		"valid": {func(string) []zipped { return []zipped{license, plugin} }, "ENGINE is true"},
		"a link for the authorities": {func(victim string) []zipped {
			return []zipped{license, plugin, {"ca-certificates.crt", victim, fs.ModeSymlink | 0o777}}
		}, "must contain only"},
		"a link for the license": {func(victim string) []zipped {
			return []zipped{plugin, {"LICENSE.txt", victim, fs.ModeSymlink | 0o777}}
		}, "something other than files"},
		"a link for the binary": {func(victim string) []zipped {
			return []zipped{license, {pluginName, victim, fs.ModeSymlink | 0o777}}
		}, "something other than files"},
		"a link, then a file through it": {func(victim string) []zipped {
			return []zipped{license, {pluginName, victim, fs.ModeSymlink | 0o777}, plugin}
		}, "must contain only"},
		"a path upwards": {func(string) []zipped {
			return []zipped{license, plugin, {"../victim", "x", 0o644}}
		}, "must contain only"},
		"a directory": {func(string) []zipped {
			return []zipped{license, plugin, {"directory/", "", fs.ModeDir | 0o755}}
		}, "must contain only"},
		"no license": {func(string) []zipped { return []zipped{plugin} }, "must contain only"},
	} {
		dir := t.TempDir()
		victim := filepath.Join(dir, "victim")
		bundle := filepath.Join(dir, "bundle.pem")
		for file, content := range map[string]string{victim: precious, bundle: "-----BEGIN CERTIFICATE-----\n"} {
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		archive := filepath.Join(dir, pluginName+"_1.2.3_linux_amd64.zip")
		writeZip(t, archive, c.entries(victim)...)
		cmd := exec.Command(filepath.Join(root, "scripts", "image.sh"), archive)
		cmd.Env = append(os.Environ(), "ENGINE=true", "CA_BUNDLE="+bundle, "TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.text) {
			t.Errorf("%s: got %v, want it to fail with %q\n%s", name, err, c.text, out)
		}
		info, err := os.Stat(victim)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(victim)
		if err != nil {
			t.Fatal(err)
		}
		if string(content) != precious || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: a file elsewhere became %q with mode %s", name, content, info.Mode())
		}
	}
}

// image is what scripts/image.sh builds for `docker load`.
type image struct {
	config struct {
		Config struct {
			User       string
			Entrypoint []string
		}
	}
	id    string // SHA-256 of the configuration, in hexadecimal
	blobs map[string][]byte
	// manifest is the archive's manifest.
	manifest struct {
		Config           string
		RepoTags, Layers []string
	}
}

// buildImage runs scripts/image.sh on a release archive with the plugin under test.
// buildah keeps its data in a directory of the test.
func buildImage(t *testing.T) *image {
	t.Helper()
	for _, tool := range []string{"buildah", "unzip", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			harness.Missing(t, "%s is not on PATH; not testing the image", tool)
		}
	}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	project := filepath.Join(dir, "project")
	if err := os.MkdirAll(filepath.Join(project, "scripts"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Containerfile", "scripts/image.sh"} {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(project, name), content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	binary, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	platform := "linux_" + runtime.GOARCH
	version := strings.TrimPrefix(pluginVersion, "v")
	archive := filepath.Join(dir, pluginName+"_"+version+"_"+platform+".zip")
	writeZip(t, archive, zipped{"LICENSE.txt", "license", 0o644}, zipped{pluginName, string(binary), 0o755})
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	storage := filepath.Join(dir, "storage.conf")
	settings := fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(dir, "graph"), filepath.Join(dir, "run"))
	if err := os.WriteFile(storage, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(project, "scripts", "image.sh"), archive)
	cmd.Env = append(os.Environ(), "ENGINE=buildah", "CA_BUNDLE="+bundle, "CONTAINERS_STORAGE_CONF="+storage, "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("image.sh: %v\n%s", err, out)
	}

	img := loadImage(t, filepath.Join(project, "dist", pluginName+"_"+version+"_"+platform+".image.tar"))
	for _, want := range []string{"image's ID: " + img.id, "binary's: " + fmt.Sprintf("%x", sha256.Sum256(binary))} {
		if !strings.Contains(string(out), want) {
			t.Errorf("image.sh does not print %q:\n%s", want, out)
		}
	}
	return img
}

func loadImage(t *testing.T, file string) *image {
	t.Helper()
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	img := &image{blobs: make(map[string][]byte)}
	files := readTar(t, in)
	var manifests []json.RawMessage
	if err := json.Unmarshal(files["manifest.json"], &manifests); err != nil || len(manifests) != 1 {
		t.Fatalf("manifest.json describes %d images, want 1: %v", len(manifests), err)
	}
	if err := json.Unmarshal(manifests[0], &img.manifest); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(files[img.manifest.Config], &img.config); err != nil {
		t.Fatal(err)
	}
	img.id = fmt.Sprintf("%x", sha256.Sum256(files[img.manifest.Config]))
	for _, name := range append(img.manifest.Layers, img.manifest.Config) {
		img.blobs[name] = files[name]
	}
	return img
}

// readTar reads the regular files of a tar archive.
func readTar(t *testing.T, in io.Reader) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	for archive := tar.NewReader(in); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		files[header.Name] = content
	}
}

// unpack writes the image's files to a directory. The layers have only files and
// directories, and remove nothing.
func (img *image) unpack(t *testing.T, dir string) {
	t.Helper()
	for _, layer := range img.manifest.Layers {
		for name, content := range readTar(t, bytes.NewReader(img.blobs[layer])) {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, content, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// registry serves the image as a container registry does, at REPOSITORY:TAG for each of
// its tags. It returns the repository with the registry's address.
func (img *image) registry(t *testing.T) (repository string) {
	t.Helper()
	blobs := make(map[string][]byte)
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	describe := func(mediaType, name string) descriptor {
		digest := fmt.Sprintf("sha256:%x", sha256.Sum256(img.blobs[name]))
		blobs[digest] = img.blobs[name]
		return descriptor{mediaType, digest, len(img.blobs[name])}
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	var layers []descriptor
	for _, layer := range img.manifest.Layers {
		layers = append(layers, describe("application/vnd.oci.image.layer.v1.tar", layer))
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2,
		"mediaType":     manifestType,
		"config":        describe("application/vnd.oci.image.config.v1+json", img.manifest.Config),
		"layers":        layers,
	})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch kind, name := filepath.Split(r.URL.Path); {
		case r.URL.Path == "/v2/":
		case kind == "/v2/mojoauth/"+pluginName+"/manifests/" && slices.Contains(img.manifest.RepoTags, "localhost/"+pluginName+":"+name):
			w.Header().Set("Content-Type", manifestType)
			w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256(manifest)))
			_, _ = w.Write(manifest)
		case kind == "/v2/mojoauth/"+pluginName+"/blobs/" && blobs[name] != nil:
			_, _ = w.Write(blobs[name])
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/mojoauth/" + pluginName
}

// One image works in both products, each with its own rules.
func TestImage(t *testing.T) {
	t.Parallel()
	plugins := t.TempDir()
	vault := harness.StartVault(t, vaultBinary, plugins)
	img := buildImage(t)
	if vault.Product == harness.OpenBao {
		openBaoDownloads(t, vault, plugins, img)
	} else {
		vaultStarts(t, vault, plugins, img)
	}
	vault.Enable(t, "mojoauth", pluginName, pluginVersion)
	secret, err := vault.Logical().Read("mojoauth/status")
	if err != nil {
		t.Fatal(err)
	}
	if got := secret.Data["version"]; got != pluginVersion {
		t.Errorf("got version %v, want %s", got, pluginVersion)
	}
}

// openBaoDownloads makes OpenBao extract the binary from the image, with the stanza from
// the documentation.
func openBaoDownloads(t *testing.T, bao *harness.Vault, plugins string, img *image) {
	t.Helper()
	declare(t, bao, plugins, documented(t, "docs/container.md", "hcl", "image "), map[string]string{
		"registry.example.com/mojoauth/" + pluginName: img.registry(t),
	})
}

// declare starts OpenBao with a documented stanza for the plugin under test.
func declare(t *testing.T, bao *harness.Vault, plugins, stanza string, more map[string]string) {
	t.Helper()
	own := map[string]string{
		"v0.1.0":                   pluginVersion,
		"<the binary's SHA-256>":   sha256Of(t, filepath.Join(pluginDir, pluginBinary)),
		"\"/opt/openbao/plugins\"": fmt.Sprintf("%q", plugins),
	}
	maps.Copy(own, more)
	stanza = replaced(t, stanza, own)
	config := filepath.Join(bao.Dir, "vault.hcl")
	content, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	// The stanza also sets plugin_directory.
	without := regexp.MustCompile(`(?m)^plugin_directory .*$`).ReplaceAll(content, nil)
	if err := os.WriteFile(config, append(without, stanza...), 0o600); err != nil {
		t.Fatal(err)
	}
	bao.Kill(t)
	bao.Start(t)
	bao.Unseal(t)
}

// OpenBao registers a binary that its configuration declares.
func TestDeclaredBinary(t *testing.T) {
	t.Parallel()
	product, _, err := harness.ProductOf(vaultBinary)
	if err != nil {
		t.Fatal(err)
	}
	if product != harness.OpenBao {
		harness.Skip(t, "Vault's configuration cannot declare plugins")
	}
	plugins := t.TempDir()
	bao := harness.StartVault(t, vaultBinary, plugins)
	binary, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(plugins, pluginName), binary, 0o700); err != nil {
		t.Fatal(err)
	}
	declare(t, bao, plugins, documented(t, "docs/container.md", "hcl", "command "), nil)
	bao.Enable(t, "mojoauth", pluginName, pluginVersion)
	if _, err := bao.Logical().Read("mojoauth/status"); err != nil {
		t.Error(err)
	}
}

// vaultStarts does what Vault does. The image whose ID is the registered checksum must be
// tagged with the version without v; Vault starts its entrypoint, in the image's files,
// as the image's user. Without a Docker Engine, the test registers the entrypoint as a
// binary.
func vaultStarts(t *testing.T, vault *harness.Vault, plugins string, img *image) {
	t.Helper()
	if tag := "localhost/" + pluginName + ":" + strings.TrimPrefix(pluginVersion, "v"); !slices.Contains(img.manifest.RepoTags, tag) {
		t.Errorf("got the tags %q, want %q among them", img.manifest.RepoTags, tag)
	}
	if want := img.id + ".json"; img.manifest.Config != want {
		t.Errorf("got the configuration %s, want it named by its ID, %s", img.manifest.Config, want)
	}
	files := t.TempDir()
	img.unpack(t, files)
	if len(img.config.Config.Entrypoint) != 1 {
		t.Fatalf("got the entrypoint %q, want only the binary", img.config.Config.Entrypoint)
	}
	entrypoint := img.config.Config.Entrypoint[0]
	if os.Geteuid() == 0 {
		// Only its owner can read t.TempDir.
		if err := os.Chmod(files, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), entrypoint, "-version")
		cmd.Dir, cmd.Env = "/", []string{"PATH=/"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: files, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), pluginVersion) {
			t.Errorf("with only the image's files, as its user: got %q, %v", out, err)
		}
	}
	if err := os.Rename(filepath.Join(files, entrypoint), filepath.Join(plugins, pluginName)); err != nil {
		t.Fatal(err)
	}
	vault.Register(t, plugins, pluginName, pluginName, pluginVersion)
}

// documented returns the code block in the given language that contains text.
func documented(t *testing.T, document, language, text string) string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(root, document))
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(string(content), -1) {
		if strings.Contains(block[1], text) {
			return block[1]
		}
	}
	t.Fatalf("%s has no %s block with %q", document, language, text)
	return ""
}
