// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// This program calls an API that MojoAuth protects, with an access token from
// Vault. See examples/README.md for the variables.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// A tokenSource returns the token for the next call: a newer one, if there is one,
// when the API refused the last.
type tokenSource interface {
	token(refused bool) (string, error)
}

// fileSource reads the file for every call, because Vault Agent replaces it.
type fileSource string

func (path fileSource) token(bool) (string, error) {
	content, err := os.ReadFile(string(path))
	token := strings.TrimSpace(string(content))
	if err == nil && token == "" {
		err = errors.New("TOKEN_FILE is empty")
	}
	return token, err
}

// vaultSource reads from Vault, and caches the token for the ttl that Vault returns.
type vaultSource struct {
	url, vaultToken string

	cached    string
	mintedAt  string
	readAgain time.Time
}

func (v *vaultSource) token(refused bool) (string, error) {
	if !refused && time.Now().Before(v.readAgain) {
		return v.cached, nil
	}
	from := v.url
	if refused {
		// A token that is newer than the refused one.
		from += "?minted_after=" + url.QueryEscape(v.mintedAt)
	}
	now := time.Now()
	status, body, err := get(from, "X-Vault-Token", v.vaultToken)
	if err == nil && (status == http.StatusTooManyRequests || status >= 500) {
		// Vault restarts a killed plugin at the next request. After a 429, fewer
		// token requests may be waiting by then.
		time.Sleep(time.Second)
		status, body, err = get(from, "X-Vault-Token", v.vaultToken)
	}
	if err != nil {
		return "", err
	}
	var answer struct {
		Data struct {
			AccessToken       string `json:"access_token"`
			LastVaultRotation string `json:"last_vault_rotation"`
			TTL               int    `json:"ttl"`
		} `json:"data"`
		Errors []string `json:"errors"`
	}
	err = json.Unmarshal([]byte(body), &answer)
	if status != http.StatusOK {
		text := cmp.Or(strings.Join(answer.Errors, "; "), body)
		return "", fmt.Errorf("Vault returned %d: %s", status, strings.Join(strings.Fields(text), " "))
	}
	if err != nil || answer.Data.AccessToken == "" {
		return "", errors.New("Vault returned no token")
	}
	v.cached, v.mintedAt = answer.Data.AccessToken, answer.Data.LastVaultRotation
	v.readAgain = now.Add(time.Duration(answer.Data.TTL) * time.Second)
	return v.cached, nil
}

var client = &http.Client{
	Timeout: 30 * time.Second,
	// A redirect could send the token to another host.
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// get sends a GET request with one extra header, and returns the status and body.
func get(url, header, value string) (status int, body string, err error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	req.Header.Set(header, value)
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(content)), err
}

// callAPI calls the API with a token from the source.
func callAPI(url string, source tokenSource, refused bool) (status int, body string, err error) {
	token, err := source.token(refused)
	if err != nil {
		return 0, "", err
	}
	return get(url, "Authorization", "Bearer "+token)
}

func run() error {
	url := os.Getenv("API_URL")
	calls, err := strconv.Atoi(cmp.Or(os.Getenv("CALLS"), "1"))
	if err != nil {
		return fmt.Errorf("CALLS: %w", err)
	}
	interval, err := time.ParseDuration(cmp.Or(os.Getenv("INTERVAL"), "1") + "s")
	if err != nil {
		return fmt.Errorf("INTERVAL: %w", err)
	}
	required := []string{"API_URL", "VAULT_ADDR", "VAULT_TOKEN"}
	var source tokenSource = &vaultSource{
		url: strings.TrimSuffix(os.Getenv("VAULT_ADDR"), "/") + "/v1/" +
			cmp.Or(os.Getenv("MOUNT"), "mojoauth") + "/creds/" + cmp.Or(os.Getenv("ROLE"), "demo"),
		vaultToken: os.Getenv("VAULT_TOKEN"),
	}
	if path := os.Getenv("TOKEN_FILE"); path != "" {
		required = required[:1]
		source = fileSource(path)
	}
	for _, name := range required {
		if os.Getenv(name) == "" {
			return fmt.Errorf("%s is not set", name)
		}
	}

	for call := 0; call < calls; call++ {
		if call > 0 {
			time.Sleep(interval)
		}
		status, body, err := callAPI(url, source, false)
		if err == nil && status == http.StatusUnauthorized {
			// The API may accept a newer token. Try only once: a second 401 has
			// another cause.
			status, body, err = callAPI(url, source, true)
		}
		if err != nil {
			return err
		}
		if status < 200 || status > 299 {
			return fmt.Errorf("the API returned %d: %s", status, body)
		}
		fmt.Println(status, body)
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "call-api:", err)
		os.Exit(1)
	}
}
