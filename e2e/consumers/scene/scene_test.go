// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package scene

import (
	"os"
	"testing"
	"time"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// The scene's API accepts a token from the engine, and Reads counts it.
func TestScene(t *testing.T) {
	s := New(t, time.Hour, nil)
	secret, err := s.Vault.Logical().Read("mojoauth/creds/reports")
	if err != nil {
		t.Fatal(err)
	}
	token, _ := secret.Data["access_token"].(string)
	if status, err := s.CallAPI(token); err != nil || status != 200 {
		t.Errorf("the API returned %d, %v, want 200", status, err)
	}
	if reads, mints := s.Reads(); reads["minted"] != 1 || mints != 1 {
		t.Errorf("status reports the reads %v and %d mints, want one of each", reads, mints)
	}
}
