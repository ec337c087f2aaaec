// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/logical"
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

// withoutForwarding is the answer to a request, without an error on which Vault or
// OpenBao would have another node answer. Its status stays.
func withoutForwarding(resp *logical.Response, err error) (*logical.Response, error) {
	const withheldError = "the error is withheld, because Vault would take its text for one of its own"
	if resp.IsError() && forwardsElsewhere(resp.Error().Error()) {
		resp = logical.ErrorResponse(withheldError)
	}
	// The bare error is meant: the SDK answers it where this node may not write.
	if err == nil || err == logical.ErrReadOnly || !forwardsElsewhere(err.Error()) { //nolint:errorlint // see above
		return resp, err
	}
	status := http.StatusInternalServerError
	if coded, ok := err.(logical.HTTPCodedError); ok { //nolint:errorlint // a wrapped one has no status to Vault
		status = coded.Code()
	}
	return resp, logical.CodedError(status, withheldError)
}
