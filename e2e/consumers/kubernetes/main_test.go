// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package kubernetes tests the External Secrets Operator with a real Kubernetes API server,
// which also validates the manifests in docs/consumers.md.
package kubernetes

import (
	"fmt"
	"os"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
)

var tools programs

func TestMain(m *testing.M) {
	var err error
	if tools, err = findPrograms(); err != nil {
		fmt.Fprintln(os.Stderr, "kubernetes:", err)
		os.Exit(1)
	}
	os.Exit(scene.Main(m))
}
