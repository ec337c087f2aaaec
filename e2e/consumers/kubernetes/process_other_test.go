// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

//go:build !linux

package kubernetes

import "os/exec"

// endWithParent does nothing on systems other than Linux.
func endWithParent(*exec.Cmd) {}
