// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file is the path config/<name>: one MojoAuth machine-to-machine
// application. Bare config is config/default.

const (
	configPrefix      = "config/"
	defaultConfigName = "default"

	// RFC 7591 §2 names.
	authMethodPost  = "client_secret_post"
	authMethodBasic = "client_secret_basic"

	defaultRequestTimeout = 10 * time.Second
	minRequestTimeout     = time.Second
	// maxRequestTimeout keeps a mint within the 90 s that Vault allows a request.
	maxRequestTimeout = 60 * time.Second

	defaultMaxRetries = 2
	maxMaxRetries     = 10

	defaultMaxRequestsPerSecond = 20
	maxMaxRequestsPerSecond     = 1000
)

// configEntry is a config as stored.
type configEntry struct {
	TokenURL                string        `json:"token_url"`
	ClientID                string        `json:"client_id"`
	ClientSecret            string        `json:"client_secret"`
	TokenEndpointAuthMethod string        `json:"token_endpoint_auth_method"`
	CACert                  string        `json:"ca_cert,omitempty"`
	RequestTimeout          time.Duration `json:"request_timeout"` // nanoseconds
	MaxRetries              int           `json:"max_retries"`
	MaxRequestsPerSecond    int           `json:"max_requests_per_second"`
	PersistTokens           *bool         `json:"persist_tokens,omitempty"` // nil is true

	// TokenGeneration is random. It changes when the client or its token endpoint
	// changes, because tokens depend on both. A node serves only tokens minted under
	// the generation in storage.
	TokenGeneration string `json:"token_generation"`
}

func (b *backend) pathConfig() []*framework.Path {
	named := map[string]*framework.FieldSchema{
		"name": {
			Type:        framework.TypeString,
			Required:    true,
			Description: `Name of the config, in lower case. Roles refer to it in their "config" field.`,
		},
	}
	for name, schema := range configFields() {
		named[name] = schema
	}
	return []*framework.Path{
		{
			Pattern: "config/" + framework.GenericNameRegex("name") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
			},
			Fields:          named,
			ExistenceCheck:  b.configExists,
			Operations:      b.configOperations("config"),
			HelpSynopsis:    "Configure a MojoAuth application to mint tokens with.",
			HelpDescription: strings.TrimSpace(configHelp),
		},
		{
			Pattern: "config$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
			},
			Fields:          configFields(),
			ExistenceCheck:  b.configExists,
			Operations:      b.configOperations("default-config"),
			HelpSynopsis:    `Configure the default MojoAuth application, "config/default".`,
			HelpDescription: strings.TrimSpace(configHelp),
		},
		listPath("config/$", "configs", "Each config holds one MojoAuth application. Read a config at config/<name>.", b.configs.list),
	}
}

func configFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"token_url": {
			Type: framework.TypeString,
			Description: `URL of the token endpoint, for example
https://your-app.mojoauth.com/oauth2/token. It may include a query string such as
?env=test. The scheme must be https; http is allowed for a loopback host only. The
host must be ASCII: send an internationalized name in its xn-- form. Required. At
most 2 KiB. To change it, send client_secret in the same request.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Token URL"},
		},
		"client_id": {
			Type:         framework.TypeString,
			Description:  "Client ID of the MojoAuth machine-to-machine application. Required. At most 1 KiB.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Client ID"},
		},
		"client_secret": {
			Type: framework.TypeString,
			Description: `Client secret of the application. Required. At most 4 KiB. Vault stores it and
never returns it. An update without this field keeps the stored secret; null is
refused. One trailing newline is removed.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Client secret", Sensitive: true},
		},
		"token_endpoint_auth_method": {
			Type:          framework.TypeString,
			Default:       authMethodPost,
			AllowedValues: []any{authMethodPost, authMethodBasic},
			Description: `How the client authenticates to the token endpoint: client_secret_post
(credentials in the form) or client_secret_basic (credentials in the Authorization
header).`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Token endpoint auth method", Value: authMethodPost},
		},
		"ca_cert": {
			Type: framework.TypeString,
			Description: `PEM-encoded CA certificates to trust for this endpoint, in addition to the
system's. Send an empty value to remove them. You cannot turn off certificate
verification. At most 64 KiB. To change it, send client_secret in the same request.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificate", EditType: "file"},
		},
		"request_timeout": {
			Type:    framework.TypeDurationSecond,
			Default: int(defaultRequestTimeout / time.Second),
			Description: `Time limit for minting one token, including all retries, counted from its first
request: 1s to 60s. A number of seconds or a duration such as 10s.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Request timeout", Value: "10s"},
		},
		"max_retries": {
			Type:    framework.TypeInt,
			Default: defaultMaxRetries,
			Description: `How many times to retry a token request within request_timeout after a temporary
failure (a network error, or HTTP 500, 502, 503, or 504): 0 to 10. Repeating a request
after HTTP 429 does not count.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Max retries", Value: defaultMaxRetries},
		},
		"max_requests_per_second": {
			Type:    framework.TypeInt,
			Default: defaultMaxRequestsPerSecond,
			Description: `Maximum number of requests per second to this token endpoint, including retries,
rotations, and verifications: 1 to 1000. Set it to what your MojoAuth plan allows,
less the requests that others send from the same IP address. A new value takes
effect immediately.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Max requests per second", Value: defaultMaxRequestsPerSecond},
		},
		"persist_tokens": {
			Type:    framework.TypeBool,
			Default: true,
			Description: `Whether to also keep each role's token in Vault's storage, encrypted like all data
there. Stored tokens survive a restart of the plugin, and all nodes of the cluster
share them. false deletes the stored tokens; each node then mints its own.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Persist tokens", Value: true},
		},
		"verify_connection": {
			Type:    framework.TypeBool,
			Default: true,
			Description: `Whether to request one token before saving, and save only if MojoAuth accepts the
client. false saves without verification. Not stored.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Verify connection", Value: true},
		},
	}
}

func (b *backend) configOperations(suffix string) map[logical.Operation]framework.OperationHandler {
	attrs := func(verb string) *framework.DisplayAttributes {
		return &framework.DisplayAttributes{OperationVerb: verb, OperationSuffix: suffix}
	}
	write := &framework.PathOperation{
		Callback:                    b.configWrite,
		Summary:                     "Write a config. Omitted fields keep their values.",
		DisplayAttrs:                attrs("write"),
		Responses:                   writeResponse,
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return map[logical.Operation]framework.OperationHandler{
		logical.CreateOperation: write,
		logical.UpdateOperation: write,
		logical.ReadOperation: &framework.PathOperation{
			Callback:     b.configRead,
			Summary:      "Read a config without its client secret.",
			DisplayAttrs: attrs("read"),
			Responses: map[int][]framework.Response{http.StatusOK: {{
				Description: "OK",
				Fields: map[string]*framework.FieldSchema{
					"token_url":                  {Type: framework.TypeString, Required: true, Description: "URL of the token endpoint."},
					"client_id":                  {Type: framework.TypeString, Required: true, Description: "Client ID of the application."},
					"token_endpoint_auth_method": {Type: framework.TypeString, Required: true, Description: "How the client authenticates: client_secret_post or client_secret_basic."},
					"ca_cert":                    {Type: framework.TypeString, Required: true, Description: "PEM-encoded CA certificates that are trusted in addition to the system's."},
					"request_timeout":            {Type: framework.TypeInt64, Required: true, Description: "Time limit for minting one token, in seconds."},
					"max_retries":                {Type: framework.TypeInt, Required: true, Description: "How many times a token request is retried after a temporary failure."},
					"max_requests_per_second":    {Type: framework.TypeInt, Required: true, Description: "Maximum number of requests per second to the token endpoint."},
					"persist_tokens":             {Type: framework.TypeBool, Required: true, Description: "Whether tokens are also kept in Vault's storage."},
				},
			}}},
		},
		logical.RecoverOperation: &framework.PathOperation{
			Callback:                    b.configRecover,
			Summary:                     "Recover a config, including its client secret, from a loaded snapshot.",
			DisplayAttrs:                attrs("recover"),
			Responses:                   writeResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
		logical.DeleteOperation: &framework.PathOperation{
			Callback:                    b.configDelete,
			Summary:                     "Delete a config and drop its cached and stored tokens.",
			DisplayAttrs:                attrs("delete"),
			Responses:                   deleteResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
	}
}

// configName returns the name of the config that a request addresses.
func configName(d *framework.FieldData) string {
	if _, named := d.Schema["name"]; named {
		return d.Get("name").(string)
	}
	return defaultConfigName
}

func (b *backend) configExists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	config, err := b.configs.get(ctx, req.Storage, configName(d))
	return config != nil, err
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	config, err := b.configs.shown(ctx, req, configName(d))
	if err != nil || config == nil {
		return nil, err
	}
	return &logical.Response{Data: config.entry.toResponseData()}, nil
}

// toResponseData returns what a read shows: everything except the client secret.
func (c *configEntry) toResponseData() map[string]any {
	return map[string]any{
		"token_url":                  c.TokenURL,
		"client_id":                  c.ClientID,
		"token_endpoint_auth_method": c.TokenEndpointAuthMethod,
		"ca_cert":                    c.CACert,
		"request_timeout":            int64(c.RequestTimeout / time.Second),
		"max_retries":                c.MaxRetries,
		"max_requests_per_second":    c.requestsPerSecond(),
		"persist_tokens":             c.persistsTokens(),
	}
}

// persistsTokens reports whether the config's tokens are kept in storage. They are for an
// entry that was stored before the field existed.
func (c *configEntry) persistsTokens() bool { return c.PersistTokens == nil || *c.PersistTokens }

// longest is how long a request to this engine waits for a token. It is a little less than
// request_timeout plus a second, which leaves time to answer within that limit.
func (c *configEntry) longest() time.Duration { return c.RequestTimeout + 990*time.Millisecond }

// requestsPerSecond is the limit of the config's gate. An entry that was stored before the
// field existed has the default.
func (c *configEntry) requestsPerSecond() int {
	return cmp.Or(c.MaxRequestsPerSecond, defaultMaxRequestsPerSecond)
}

func (b *backend) configDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := configName(d)
	if _, err := b.configs.remove(ctx, req.Storage, name); err != nil {
		return nil, err
	}
	resp := &logical.Response{}
	b.pruneConfig(ctx, name, resp)
	return unlessEmpty(resp), nil
}

// pruneConfig deletes the stored tokens of a config that was written, except those that are
// still valid. A failure is a warning only, because such tokens are never served.
func (b *backend) pruneConfig(ctx context.Context, name string, resp *logical.Response) {
	if b.tokens.pruneConfig(ctx, name) != nil {
		resp.AddWarning(fmt.Sprintf("Some older tokens of config %q could not be deleted from storage. They are no longer served, and the hourly sweep deletes them.", name))
	}
}

func (b *backend) configWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, err := b.writeConfig(ctx, req, configName(d), d)
	var mistake problem
	if errors.As(err, &mistake) {
		return logical.ErrorResponse("config %q was not saved: %s", configName(d), mistake), nil
	}
	return resp, err
}

// writeConfig verifies a config and saves it. The error is a problem if the user can fix
// it, and does not name the config.
func (b *backend) writeConfig(ctx context.Context, req *logical.Request, name string, d *framework.FieldData) (*logical.Response, error) {
	old, err := b.configs.load(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	config, err := mergeConfig(old, d)
	if err != nil {
		return nil, problem(err.Error())
	}
	resp := &logical.Response{}
	if d.Get("verify_connection").(bool) {
		// This comes before update takes its lock, so no other write waits for MojoAuth.
		warning, err := b.verifyConnection(ctx, name, config)
		if err != nil {
			return nil, err
		}
		if warning != "" {
			resp.AddWarning(warning)
		}
	}
	_, err = b.configs.update(ctx, req.Storage, name, func(current *held[configEntry]) (*configEntry, error) {
		if !current.same(old) || !allowed(req.Operation, current != nil) {
			return nil, errChanged
		}
		return config, nil
	})
	if err != nil {
		return nil, err
	}
	b.configSaved(ctx, name, old, config, resp)
	return unlessEmpty(resp), nil
}

// configSaved does what remains after a config was saved.
func (b *backend) configSaved(ctx context.Context, name string, old *held[configEntry], config *configEntry, resp *logical.Response) {
	b.telemetry.configSeen(name)
	if old != nil && (config.TokenGeneration != old.entry.TokenGeneration || old.entry.persistsTokens() && !config.persistsTokens()) {
		b.pruneConfig(ctx, name, resp)
	}
}

// sameClient reports whether tokens of both configs belong to the same client.
func (c *configEntry) sameClient(other *configEntry) bool {
	return c.TokenURL == other.TokenURL && c.ClientID == other.ClientID
}

// mergeConfig returns old with the fields of the request merged in, and validates the
// result. Its error names the field and says how to fix it.
func mergeConfig(old *held[configEntry], d *framework.FieldData) (*configEntry, error) {
	config := configEntry{
		TokenEndpointAuthMethod: authMethodPost,
		RequestTimeout:          defaultRequestTimeout,
		MaxRetries:              defaultMaxRetries,
		MaxRequestsPerSecond:    defaultMaxRequestsPerSecond,
	}
	if old != nil {
		config = old.entry
		config.MaxRequestsPerSecond = config.requestsPerSecond()
	}

	if v, ok := d.GetOk("token_url"); ok {
		config.TokenURL = v.(string)
	}
	if v, ok := d.GetOk("client_id"); ok {
		config.ClientID = v.(string)
	}
	_, secretSent := d.GetOk("client_secret")
	if secretSent {
		config.ClientSecret = cutLineEnd(d.Get("client_secret").(string))
	}
	if v, ok := d.GetOk("token_endpoint_auth_method"); ok {
		config.TokenEndpointAuthMethod = v.(string)
	}
	if v, ok := d.GetOk("ca_cert"); ok {
		config.CACert = strings.TrimSpace(v.(string))
	}
	if v, ok := d.GetOk("request_timeout"); ok {
		config.RequestTimeout = time.Duration(v.(int)) * time.Second
	}
	if v, ok := d.GetOk("max_retries"); ok {
		config.MaxRetries = v.(int)
	}
	if v, ok := d.GetOk("max_requests_per_second"); ok {
		config.MaxRequestsPerSecond = v.(int)
	}
	if v, ok := d.GetOk("persist_tokens"); ok {
		persist := v.(bool)
		config.PersistTokens = &persist
	}

	if err := config.validate(); err != nil {
		return nil, err
	}
	if old != nil && !secretSent {
		// These are compared verbatim: two spellings of one host may resolve differently.
		for _, field := range []struct{ name, was, becomes string }{
			{"token_url", old.entry.TokenURL, config.TokenURL},
			{"ca_cert", old.entry.CACert, config.CACert},
		} {
			if field.was != field.becomes {
				return nil, fmt.Errorf("%s changes, which requires the client secret; send client_secret in the same request, so someone who doesn't know the secret can't redirect it", field.name)
			}
		}
	}
	if old == nil || !old.entry.sameClient(&config) {
		config.TokenGeneration = rand.Text()
	}
	return &config, nil
}

// cutLineEnd removes the trailing newline that a terminal or a file adds.
func cutLineEnd(text string) string {
	if line, ok := strings.CutSuffix(text, "\n"); ok {
		return strings.TrimSuffix(line, "\r")
	}
	return text
}

// validate checks the entire config.
func (c *configEntry) validate() error {
	for _, field := range []struct{ name, value string }{
		{"token_url", c.TokenURL},
		{"client_id", c.ClientID},
		{"client_secret", c.ClientSecret},
		{"ca_cert", c.CACert},
	} {
		if err := checkText(field.name, field.value); err != nil {
			return err
		}
	}
	if err := validateTokenURL(c.TokenURL); err != nil {
		return err
	}
	for _, field := range []struct{ name, value string }{
		{"client_id", c.ClientID},
		{"client_secret", c.ClientSecret},
	} {
		if field.value == "" {
			return fmt.Errorf("%s is required; send the value that MojoAuth shows for the application", field.name)
		}
		if strings.ContainsFunc(field.value, isControl) {
			return fmt.Errorf("%s contains a control character (often a trailing newline); remove it", field.name)
		}
	}
	switch c.TokenEndpointAuthMethod {
	case authMethodPost, authMethodBasic:
	default:
		return fmt.Errorf("token_endpoint_auth_method %q is not supported; send %s or %s", c.TokenEndpointAuthMethod, authMethodPost, authMethodBasic)
	}
	if err := validateCACert(c.CACert); err != nil {
		return err
	}
	if c.RequestTimeout < minRequestTimeout || c.RequestTimeout > maxRequestTimeout {
		return fmt.Errorf("request_timeout %ds is out of range; send %ds to %ds", c.RequestTimeout/time.Second, minRequestTimeout/time.Second, maxRequestTimeout/time.Second)
	}
	if c.MaxRetries < 0 || c.MaxRetries > maxMaxRetries {
		return fmt.Errorf("max_retries %d is out of range; send 0 to %d", c.MaxRetries, maxMaxRetries)
	}
	if n := c.MaxRequestsPerSecond; n < 1 || n > maxMaxRequestsPerSecond {
		return fmt.Errorf("max_requests_per_second %d is out of range; send 1 to %d", n, maxMaxRequestsPerSecond)
	}
	return nil
}

func isControl(r rune) bool { return r < 0x20 || r == 0x7f }

// validateTokenURL accepts an https URL with any host, and an http URL with a loopback
// host. Errors do not repeat the URL, because it may contain a password.
func validateTokenURL(raw string) error {
	const example = "for example https://your-app.mojoauth.com/oauth2/token"
	if raw == "" {
		return errors.New("token_url is required; send the full URL of the token endpoint, " + example)
	}
	if strings.ContainsFunc(hostIn(raw), func(r rune) bool { return r >= utf8.RuneSelf || r == '%' }) {
		return errors.New("token_url has a host with non-ASCII or percent-encoded characters; send the ASCII form of the host, in which internationalized labels begin with xn--")
	}
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" || u.Opaque != "" || strings.ContainsFunc(raw, func(r rune) bool { return r == ' ' || isControl(r) }) {
		return errors.New("token_url is not a full URL; send a full URL without spaces, " + example)
	}
	switch {
	case !isHost(u):
		return errors.New("token_url has a host that is neither a name (letters, digits, -, _, and dots) nor an IP address; send the full URL of the token endpoint, " + example)
	case u.User != nil:
		return errors.New("token_url contains user information before an @; remove it, and send credentials in client_id and client_secret")
	case strings.Contains(raw, "#"):
		return errors.New("token_url contains a fragment (#); remove it")
	case u.Scheme == "https":
	case u.Scheme == "http" && isLoopback(u.Hostname()):
	case u.Scheme == "http":
		return errors.New("token_url is an http URL, which would send the client secret unencrypted; send an https URL (http is allowed for a loopback host only)")
	default:
		return fmt.Errorf("token_url has the scheme %q; send an https URL, %s", u.Scheme, example)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("token_url has the port %q; send a port from 1 to 65535, or none", port)
		}
	}
	return nil
}

// isHost reports whether a URL's host is a name or an IP address. url.Parse also accepts
// hosts that cannot be dialed.
func isHost(u *url.URL) bool {
	if strings.HasPrefix(u.Host, "[") {
		ip, err := netip.ParseAddr(u.Hostname())
		return err == nil && ip.Is6() && ip.Zone() == ""
	}
	return !strings.ContainsFunc(u.Hostname(), func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' && r != '_' && r != '.'
	})
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// hostIn returns the host and port of a URL verbatim. url.Parse would decode them.
func hostIn(raw string) string {
	_, host, _ := strings.Cut(raw, "//")
	if end := strings.IndexAny(host, "/?#"); end >= 0 {
		host = host[:end]
	}
	return host[strings.LastIndexByte(host, '@')+1:]
}

func validateCACert(bundle string) error {
	rest, found := []byte(bundle), 0
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("ca_cert contains a PEM block of type %q; send certificates only", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("ca_cert contains a certificate that cannot be parsed: %w", err)
		}
		found++
	}
	if len(strings.TrimSpace(string(rest))) != 0 || (bundle != "" && found == 0) {
		return errors.New("ca_cert is not PEM; send certificates with their BEGIN CERTIFICATE and END CERTIFICATE lines, from the CLI as ca_cert=@file.pem")
	}
	return nil
}

// verifyConnection requests a token with the config and discards it. A refusal that
// concerns only the request, such as a missing scope, shows that the credentials are good,
// so it is a warning. The error is a problem, or reports that ctx ended.
func (b *backend) verifyConnection(ctx context.Context, name string, config *configEntry) (warning string, err error) {
	leave, err := b.verifications.enter(ctx, config.RequestTimeout)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, config.longest())
	defer cancel()
	// Waiting for a turn ends earlier than ctx, so its error can still be reported.
	waiting, cancel := context.WithTimeout(ctx, config.longest()-100*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		defer leave()
		ended <- b.tokens.tryOut(waiting, name, config)
	}()
	select {
	case err = <-ended:
	case <-ctx.Done(): // the client did not honor its own deadline
		err = ctx.Err()
	}
	var (
		failed *mintError
		late   *noTurnError
	)
	switch {
	case errors.As(err, &late):
		return "", problemf("verification failed: %s, or send verify_connection=false to save it without verification", late.reason())
	case errors.Is(err, gate.ErrClosed):
		return "", errChanged
	case errors.Is(err, context.DeadlineExceeded):
		failed = &mintError{class: classTimeout, allowed: config.RequestTimeout}
	case !errors.As(err, &failed):
		return "", err
	case failed.acceptsClient():
		return fmt.Sprintf("MojoAuth accepted the client, but issued no token for a request without audience and scopes: %s. Roles must request what it allows.", failed), nil
	}
	return "", problemf("verification failed: %s. %s, or send verify_connection=false to save it without verification", failed, failed.remedy())
}

// tryOut mints a token with a config that may later be saved under that name, and discards
// the token. The error is that of minter.mint, or a *noTurnError if time ran out.
func (c *tokenCache) tryOut(ctx context.Context, name string, config *configEntry) error {
	client, err := c.newClient(config)
	if err != nil {
		return err
	}
	t := &turn{
		Turn:    c.gates.tryOut(name, config).Turn("", gate.Verification),
		waiting: ctx,
		account: func(how gate.Answer) { c.telemetry.requested(name, how) },
	}
	_, err = client.mint(ctx, tokenRequest{retries: config.MaxRetries}, t)
	var late *gate.NoTurnError
	if errors.As(err, &late) {
		return &noTurnError{NoTurnError: late, config: name}
	}
	return err
}

// verificationPause is the minimum time between the starts of two verifications.
const verificationPause = time.Second

// verifications run one at a time, at intervals of at least verificationPause: they may
// contact any host, with any secret, and leave no trace in storage.
type verifications struct {
	turn chan struct{} // holds one token
	next time.Time     // when the next may start; guarded by turn
}

func newVerifications() *verifications { return &verifications{turn: make(chan struct{}, 1)} }

// enter waits for a turn, for patience at most. The caller must call leave afterward.
func (v *verifications) enter(ctx context.Context, patience time.Duration) (leave func(), err error) {
	busy := problem("other configs are being verified, one at a time. Try again in a few seconds, or send verify_connection=false to save it without verification")
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case v.turn <- struct{}{}:
	case <-late.C:
		return nil, busy
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-time.After(time.Until(v.next)):
		v.next = time.Now().Add(verificationPause)
		return func() { <-v.turn }, nil
	case <-late.C:
		err = busy
	case <-ctx.Done():
		err = ctx.Err()
	}
	<-v.turn
	return nil, err
}

const configHelp = `
A config holds one MojoAuth machine-to-machine application: its token endpoint,
client ID, and client secret. The engine verifies a config before saving it, unless you
send verify_connection=false.

Updates merge: omitted fields keep their values. Changing token_url or client_id, or
deleting the config, drops all of its cached and stored tokens. Other changes keep
them, so you can replace a client secret without interrupting reads. A successful
write ends the config's back-off.

Each role's token is also kept in Vault's storage, so it survives a restart of the
plugin. persist_tokens=false deletes the stored tokens and keeps tokens in memory only;
each node then mints its own.

"config" is short for "config/default". Listing "config/" returns the names of all
configs.
`
