// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/logical"
)

// forwardingTexts has the errors that make Vault and OpenBao forward a request to another
// node. Both recognize them by their text, anywhere in an error. An error that quotes one,
// by accident or because someone made MojoAuth return it, would turn the request into a
// redirect to the node that just answered it.
var forwardingTexts = []string{
	"cannot write to readonly storage",  // logical.ErrReadOnly
	"please forward to the active node", // logical.ErrPerfStandbyPleaseForward
	"node is not the leader",            // Raft storage
	"vault is in standby mode",          // consts.ErrStandby
}

// forwardsElsewhere reports whether Vault or OpenBao would forward a request because of an
// error with this text. Unlike theirs, the comparison ignores case.
func forwardsElsewhere(text string) bool {
	text = strings.ToLower(text)
	return slices.ContainsFunc(forwardingTexts, func(forwarding string) bool { return strings.Contains(text, forwarding) })
}

// withoutForwarding returns the response to a request, without an error that would make
// Vault or OpenBao forward it. The status stays the same.
func withoutForwarding(resp *logical.Response, err error) (*logical.Response, error) {
	const withheldError = "error withheld, because Vault would mistake its text for one of its own errors"
	if resp.IsError() && forwardsElsewhere(resp.Error().Error()) {
		resp = logical.ErrorResponse(withheldError)
	}
	// Only the bare error forwards: the SDK returns it where this node may not write.
	if err == nil || err == logical.ErrReadOnly || !forwardsElsewhere(err.Error()) { //nolint:errorlint // see above
		return resp, err
	}
	status := http.StatusInternalServerError
	if coded, ok := err.(logical.HTTPCodedError); ok { //nolint:errorlint // a wrapped one has no status to Vault
		status = coded.Code()
	}
	return resp, logical.CodedError(status, withheldError)
}
