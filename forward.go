// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"slices"
	"strings"
)

// forwardingTexts are the errors on which Vault and OpenBao have another node
// answer a request. Both recognize them by their text, anywhere in an error: an
// error that quotes one by accident, or because somebody had MojoAuth say so, turns
// a request into a redirect to the node that just answered it.
var forwardingTexts = []string{
	"cannot write to readonly storage",  // logical.ErrReadOnly
	"please forward to the active node", // logical.ErrPerfStandbyPleaseForward
	"node is not the leader",            // Raft storage
	"vault is in standby mode",          // consts.ErrStandby
}

// forwardsElsewhere reports whether Vault or OpenBao would have another node answer
// a request, because its error has this text. Case does not count here, though it
// does to them.
func forwardsElsewhere(text string) bool {
	text = strings.ToLower(text)
	return slices.ContainsFunc(forwardingTexts, func(forwarding string) bool { return strings.Contains(text, forwarding) })
}
