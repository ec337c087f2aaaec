// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// This program reads an access token from Vault with
// github.com/hashicorp/vault/api and calls an API that MojoAuth protects.
// See examples/README.md for the environment variables.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// vaultSource reads a token from Vault and keeps it for the token's ttl. It is
// not safe for concurrent use.
type vaultSource struct {
	client *api.Client
	path   string

	cached    string
	mintedAt  string
	readAgain time.Time
}

// token returns the token for the next call. If the API refused the last token,
// it returns one that was minted later.
func (v *vaultSource) token(ctx context.Context, refused bool) (string, error) {
	if !refused && time.Now().Before(v.readAgain) {
		return v.cached, nil
	}
	query := map[string][]string{}
	if refused {
		query["minted_after"] = []string{v.mintedAt}
	}
	now := time.Now()
	// The client retries a 412, a 429, or a 5xx.
	secret, err := v.client.Logical().ReadWithDataWithContext(ctx, v.path, query)
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		return "", fmt.Errorf("Vault answered %d: %s", answer.StatusCode, oneLine(answer.Errors))
	}
	if err != nil {
		return "", err
	}
	if secret == nil { // a 404; the client drops the text
		return "", fmt.Errorf("Vault answered 404: nothing is at %s", v.path)
	}
	token, _ := secret.Data["access_token"].(string)
	mintedAt, _ := secret.Data["last_vault_rotation"].(string)
	ttl, err := strconv.Atoi(fmt.Sprint(secret.Data["ttl"])) // a json.Number
	if err != nil || token == "" {
		return "", errors.New("Vault answered without a token")
	}
	v.cached, v.mintedAt = token, mintedAt
	v.readAgain = now.Add(time.Duration(ttl) * time.Second)
	return token, nil
}

// oneLine returns Vault's errors, which may have several lines, as one line.
func oneLine(texts []string) string {
	return strings.Join(strings.Fields(strings.Join(texts, "; ")), " ")
}

var apiClient = &http.Client{
	Timeout: 30 * time.Second,
	// A redirect could send the token to another host.
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// callAPI calls the API with a token from source.
func callAPI(ctx context.Context, url string, source *vaultSource, refused bool) (status int, body string, err error) {
	token, err := source.token(ctx, refused)
	if err != nil {
		return 0, "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := apiClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(content)), err
}

func run(ctx context.Context) error {
	for _, name := range []string{"API_URL", "VAULT_ADDR", "VAULT_TOKEN"} {
		if os.Getenv(name) == "" {
			return fmt.Errorf("%s is not set", name)
		}
	}
	url := os.Getenv("API_URL")
	calls, err := strconv.Atoi(cmp.Or(os.Getenv("CALLS"), "1"))
	if err != nil {
		return fmt.Errorf("CALLS: %w", err)
	}
	interval, err := time.ParseDuration(cmp.Or(os.Getenv("INTERVAL"), "1") + "s")
	if err != nil {
		return fmt.Errorf("INTERVAL: %w", err)
	}
	config := api.DefaultConfig() // reads VAULT_ADDR, VAULT_CACERT, VAULT_MAX_RETRIES, and others
	if config.Error != nil {
		return config.Error
	}
	client, err := api.NewClient(config) // reads VAULT_TOKEN
	if err != nil {
		return err
	}
	source := &vaultSource{
		client: client,
		path:   cmp.Or(os.Getenv("MOUNT"), "mojoauth") + "/creds/" + cmp.Or(os.Getenv("ROLE"), "demo"),
	}

	for call := range calls {
		if call > 0 {
			time.Sleep(interval)
		}
		status, body, err := callAPI(ctx, url, source, false)
		if err == nil && status == http.StatusUnauthorized {
			// The API may accept a newer token. Retry once: a second 401 has
			// another cause.
			status, body, err = callAPI(ctx, url, source, true)
		}
		if err != nil {
			return err
		}
		if status < 200 || status > 299 {
			return fmt.Errorf("the API answered %d: %s", status, body)
		}
		fmt.Println(status, body)
	}
	return nil
}

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "call-api:", err)
		os.Exit(1)
	}
}
