// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

//go:build race

package mojoauth

// simSeeds is how many cases a test run plays. There are few, because the race detector
// makes each of them slow.
const simSeeds = 20

// simRace reports whether the race detector is on.
const simRace = true
