// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

//go:build race

package gate

// raced reports whether the race detector is on, which makes simulations slow.
const raced = true
