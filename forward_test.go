// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

func TestErrorsThatWouldForwardAreWithheld(t *testing.T) {
	for _, text := range []string{"Cannot write to ReadOnly storage", "x: node is not the leader: y", "please forward to the active node", "Vault is in standby mode"} {
		resp, err := withoutForwarding(logical.ErrorResponse("role: "+text), nil)
		if err != nil || !resp.IsError() || forwardsElsewhere(resp.Error().Error()) {
			t.Errorf("a 400 with %q: got %v, %v", text, resp, err)
		}
		for status, err := range map[int]error{
			http.StatusBadGateway:          logical.CodedError(http.StatusBadGateway, text),
			http.StatusInternalServerError: fmt.Errorf("storage: %w", errors.New(text)),
		} {
			_, got := withoutForwarding(nil, err)
			coded, ok := got.(logical.HTTPCodedError) //nolint:errorlint // as Vault sees it
			if !ok || coded.Code() != status || forwardsElsewhere(got.Error()) {
				t.Errorf("%v: got %v, want status %d without the text", err, got, status)
			}
		}
	}
	// What the SDK returns on a node that may not write must stay unchanged.
	if _, err := withoutForwarding(nil, logical.ErrReadOnly); err != logical.ErrReadOnly { //nolint:errorlint // unwrapped
		t.Errorf("got %v, want logical.ErrReadOnly", err)
	}
	resp, err := withoutForwarding(logical.ErrorResponse("role \"x\" does not exist"), errors.New("other"))
	if resp.Error().Error() != "role \"x\" does not exist" || err.Error() != "other" {
		t.Errorf("other errors changed: %v, %v", resp, err)
	}
}
