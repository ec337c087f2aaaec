// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Command sbom writes the bill of materials of a release archive in CycloneDX format:
//
//	sbom ARCHIVE.zip FILE.cdx.json
//
// It lists what Go recorded in the archive's binary: the modules it was linked from and
// the version of Go. The same archive gives the same bytes, so the file has no time and
// no serial number.
package main

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

const (
	binary     = "vault-plugin-secrets-mojoauth"
	largestZip = 1 << 30
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: sbom ARCHIVE.zip FILE.cdx.json")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(archive, file string) error {
	version, err := versionOf(archive)
	if err != nil {
		return err
	}
	content, err := readBinary(archive)
	if err != nil {
		return fmt.Errorf("%s: %w", archive, err)
	}
	bom, err := describe(content, version)
	if err != nil {
		return fmt.Errorf("%s: %w", archive, err)
	}
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return err
	}
	return os.WriteFile(file, out.Bytes(), 0o644) //nolint:gosec // The file is published.
}

// versionOf returns the version in NAME_<version>_<os>_<arch>.zip. The binary's build
// information does not have it, because the linker sets it.
func versionOf(archive string) (string, error) {
	name := archive[strings.LastIndexAny(archive, `/\`)+1:]
	parts := strings.Split(strings.TrimSuffix(name, ".zip"), "_")
	if len(parts) != 4 || parts[0] != binary {
		return "", fmt.Errorf("%s is not named %s_<version>_<os>_<arch>.zip", name, binary)
	}
	return parts[1], nil
}

func readBinary(archive string) ([]byte, error) {
	r, err := zip.OpenReader(archive)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // Only reading.
	for _, file := range r.File {
		if strings.TrimSuffix(file.Name, ".exe") != binary {
			continue
		}
		content, err := file.Open()
		if err != nil {
			return nil, err
		}
		defer content.Close() //nolint:errcheck // Only reading.
		return io.ReadAll(io.LimitReader(content, largestZip))
	}
	return nil, errors.New("no " + binary + " in the archive")
}

func describe(content []byte, version string) (*cdx.BOM, error) {
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	plugin := component(cdx.ComponentTypeApplication, info.Main.Path, "v"+version)
	plugin.Name = binary
	plugin.Version = version
	plugin.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: fmt.Sprintf("%x", sha256.Sum256(content))}}
	plugin.Licenses = &cdx.Licenses{{License: &cdx.License{ID: "MPL-2.0"}}}
	var properties []cdx.Property
	for _, setting := range info.Settings {
		switch setting.Key {
		case "GOOS", "GOARCH", "CGO_ENABLED":
			properties = append(properties, cdx.Property{Name: "go:" + setting.Key, Value: setting.Value})
		}
	}
	plugin.Properties = &properties

	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	library := component(cdx.ComponentTypeLibrary, "stdlib", goVersion)
	components := []cdx.Component{library}
	for _, module := range info.Deps {
		components = append(components, dependency(module))
	}
	var refs []string
	for _, c := range components {
		refs = append(refs, c.BOMRef)
	}

	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &plugin}
	bom.Components = &components
	// Go does not record which module needs which.
	bom.Dependencies = &[]cdx.Dependency{{Ref: plugin.BOMRef, Dependencies: &refs}}
	return bom, nil
}

func dependency(module *debug.Module) cdx.Component {
	if module.Replace != nil {
		module = module.Replace
	}
	c := component(cdx.ComponentTypeLibrary, module.Path, module.Version)
	// Go's own checksum of the module, as in go.sum, which is not the checksum of a file.
	c.Properties = &[]cdx.Property{{Name: "go:sum", Value: module.Sum}}
	return c
}

func component(kind cdx.ComponentType, path, version string) cdx.Component {
	purl := "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")
	return cdx.Component{Type: kind, BOMRef: purl, Name: path, Version: version, PackageURL: purl}
}
