// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package scene

import (
	"os"
	"testing"
	"time"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// A token of a scene opens its API, and is counted.
func TestScene(t *testing.T) {
	s := New(t, time.Hour, nil)
	secret, err := s.Vault.Logical().Read("mojoauth/creds/reports")
	if err != nil {
		t.Fatal(err)
	}
	token, _ := secret.Data["access_token"].(string)
	if status, err := s.CallAPI(token); err != nil || status != 200 {
		t.Errorf("the API answers %d, %v", status, err)
	}
	if reads, mints := s.Reads(); reads["minted"] != 1 || mints != 1 {
		t.Errorf("status counts %v and %d mints, want one", reads, mints)
	}
}
