// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
)

// What a server stores, read without the engine: sys/raw decrypts it for root.

// StorageOf returns the path of a mount's storage.
func (v *Vault) StorageOf(t testing.TB, mount string) string {
	t.Helper()
	secret, err := v.Logical().Read("sys/mounts/" + mount)
	if err != nil || secret == nil {
		t.Fatalf("sys/mounts/%s: %v, %v", mount, secret, err)
	}
	return fmt.Sprintf("logical/%s/", secret.Data["uuid"])
}

// Stored returns what is stored below a path that ends in a slash, by the rest of the
// path.
func (v *Vault) Stored(path string) (map[string]string, error) {
	stored := make(map[string]string)
	list, err := v.Logical().List("sys/raw/" + path)
	if err != nil || list == nil {
		return stored, err
	}
	keys, ok := list.Data["keys"].([]any)
	if !ok {
		return nil, fmt.Errorf("sys/raw/%s has no keys: %v", path, list.Data)
	}
	for _, k := range keys {
		key := k.(string)
		if strings.HasSuffix(key, "/") {
			below, err := v.Stored(path + key)
			if err != nil {
				return nil, err
			}
			for rest, value := range below {
				stored[key+rest] = value
			}
			continue
		}
		entry, err := v.Logical().Read("sys/raw/" + path + key)
		if err != nil {
			return nil, err
		}
		if entry != nil { // otherwise it was deleted in the meantime
			stored[key] = fmt.Sprint(entry.Data["value"])
		}
	}
	return stored, nil
}

// Store writes to storage without the engine.
func (v *Vault) Store(t testing.TB, path, value string) {
	t.Helper()
	if _, err := v.Logical().Write("sys/raw/"+path, map[string]any{"value": value}); err != nil {
		t.Fatal(err)
	}
}

// BarrierOperations returns how many entries a metered server has read and written so
// far, for itself and for its mounts.
func (v *Vault) BarrierOperations(t testing.TB) (gets, puts int) {
	t.Helper()
	resp, err := v.Logical().ReadRawWithData("sys/metrics", map[string][]string{"format": {"prometheus"}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	counts := make(map[string]int)
	for lines := bufio.NewScanner(io.LimitReader(resp.Body, 10<<20)); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), " "); ok {
			if f, err := strconv.ParseFloat(value, 64); err == nil {
				counts[name] = int(f)
			}
		}
	}
	gets, puts = counts["vault_barrier_get_count"], counts["vault_barrier_put_count"]
	if gets == 0 || puts == 0 {
		t.Fatalf("got %d gets and %d puts from the server's metrics", gets, puts)
	}
	return gets, puts
}
