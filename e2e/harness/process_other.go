// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

//go:build !linux

package harness

import "os/exec"

// endWithParent does nothing on platforms without such a feature.
func endWithParent(*exec.Cmd) {}
