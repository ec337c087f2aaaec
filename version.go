// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import "strings"

// Version and Commit are set when the plugin is built:
//
//	-ldflags "-X github.com/mojoauth/vault-plugin-secrets-mojoauth.Version=1.2.3
//	          -X github.com/mojoauth/vault-plugin-secrets-mojoauth.Commit=..."
//
// Version is a semantic version; a leading v is optional.
var (
	Version = "0.0.0-dev"
	Commit  = "unknown"
)

// runningVersion is the version in the form that Vault compares with the registered one:
// vX.Y.Z.
func runningVersion() string { return "v" + strings.TrimPrefix(Version, "v") }

// VersionString is what the binary's -version flag prints.
func VersionString() string { return pluginName + " " + runningVersion() + " (" + Commit + ")" }
