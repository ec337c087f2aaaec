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
	// maxRequestTimeout keeps a mint within the 90 s that Vault gives a request.
	maxRequestTimeout = 60 * time.Second

	defaultMaxRetries = 2
	maxMaxRetries     = 10

	defaultMaxRequestsPerSecond = 20
	maxMaxRequestsPerSecond     = 1000
)

// configEntry is a config as it is stored.
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

	// TokenGeneration is random and changes with what tokens depend on: who
	// the client is, and where. Every node serves only tokens that were minted
	// under the generation that storage has.
	TokenGeneration string `json:"token_generation"`
}

func (b *backend) pathConfig() []*framework.Path {
	named := map[string]*framework.FieldSchema{
		"name": {
			Type:        framework.TypeString,
			Required:    true,
			Description: `Name of the config, in lower case, as roles name it in their field "config".`,
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
			HelpSynopsis:    "Configure a named MojoAuth application that tokens are minted with.",
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
			HelpSynopsis:    `Configure the MojoAuth application of roles that name no other: "config/default".`,
			HelpDescription: strings.TrimSpace(configHelp),
		},
		listPath("config/$", "configs", "Each config is one MojoAuth application; read one at config/<name>.", b.configs.list),
	}
}

func configFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"token_url": {
			Type: framework.TypeString,
			Description: `URL of the token endpoint, for example
https://your-app.mojoauth.com/oauth2/token. A query string such as ?env=test is
kept. It must be https; http only for a loopback host. Its host is in ASCII: send
the xn-- form of another. Required. At most 2 KiB. To change it, send client_secret
in the same request.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Token URL"},
		},
		"client_id": {
			Type:         framework.TypeString,
			Description:  "Client ID of the MojoAuth machine-to-machine application. Required. At most 1 KiB.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Client ID"},
		},
		"client_secret": {
			Type: framework.TypeString,
			Description: `Client secret of the application. Required. At most 4 KiB. It is stored in Vault
and never returned. When it is not sent, an update keeps it; null is refused. One
line end after it is cut off.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Client secret", Sensitive: true},
		},
		"token_endpoint_auth_method": {
			Type:          framework.TypeString,
			Default:       authMethodPost,
			AllowedValues: []any{authMethodPost, authMethodBasic},
			Description: `How the client authenticates: client_secret_post (in the form) or
client_secret_basic (in the Authorization header).`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Token endpoint auth method", Value: authMethodPost},
		},
		"ca_cert": {
			Type: framework.TypeString,
			Description: `PEM certificates of authorities to trust for this endpoint, in addition to
the system's. Send an empty value to remove them. Verification cannot be
switched off. At most 64 KiB. To change it, send client_secret in the same request.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificate", EditType: "file"},
		},
		"request_timeout": {
			Type:    framework.TypeDurationSecond,
			Default: int(defaultRequestTimeout / time.Second),
			Description: `Longest time that getting one token may take, all tries included, from when its
first request leaves: 1s to 60s, in seconds or as a duration like 10s.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Request timeout", Value: "10s"},
		},
		"max_retries": {
			Type:    framework.TypeInt,
			Default: defaultMaxRetries,
			Description: `How often a try that failed is repeated within request_timeout when the failure
may pass (network, 500, 502, 503, 504): 0 to 10. A 429 costs none of these.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Max retries", Value: defaultMaxRetries},
		},
		"max_requests_per_second": {
			Type:    framework.TypeInt,
			Default: defaultMaxRequestsPerSecond,
			Description: `The most requests in a second to this token endpoint, retries, rotations and
verifications included: 1 to 1000. Choose it by what MojoAuth's plan allows this
host, less what others ask from the same address. It applies at once.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Max requests per second", Value: defaultMaxRequestsPerSecond},
		},
		"persist_tokens": {
			Type:    framework.TypeBool,
			Default: true,
			Description: `Keep each role's token in Vault's storage too, encrypted like everything there, so
that it outlives the plugin's process and all nodes of the cluster share it. false
deletes what is stored; each node then mints tokens of its own.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Persist tokens", Value: true},
		},
		"verify_connection": {
			Type:    framework.TypeBool,
			Default: true,
			Description: `Ask for one token before saving, and save only when MojoAuth accepts the client.
false saves without asking. Not stored.`,
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
		Summary:                     "Write a config. Fields that are not sent keep their values.",
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
			Summary:      "Read a config, without its client secret.",
			DisplayAttrs: attrs("read"),
			Responses: map[int][]framework.Response{http.StatusOK: {{
				Description: "OK",
				Fields: map[string]*framework.FieldSchema{
					"token_url":                  {Type: framework.TypeString, Required: true, Description: "URL of the token endpoint."},
					"client_id":                  {Type: framework.TypeString, Required: true, Description: "Client ID of the application."},
					"token_endpoint_auth_method": {Type: framework.TypeString, Required: true, Description: "client_secret_post or client_secret_basic."},
					"ca_cert":                    {Type: framework.TypeString, Required: true, Description: "PEM certificates trusted in addition to the system's."},
					"request_timeout":            {Type: framework.TypeInt64, Required: true, Description: "Longest time, in seconds, that getting one token may take."},
					"max_retries":                {Type: framework.TypeInt, Required: true, Description: "How often a failed try is repeated."},
					"max_requests_per_second":    {Type: framework.TypeInt, Required: true, Description: "The most requests in a second to the token endpoint."},
					"persist_tokens":             {Type: framework.TypeBool, Required: true, Description: "Whether tokens are kept in Vault's storage too."},
				},
			}}},
		},
		logical.RecoverOperation: &framework.PathOperation{
			Callback:                    b.configRecover,
			Summary:                     "Recover a config from a loaded snapshot, with its client secret.",
			DisplayAttrs:                attrs("recover"),
			Responses:                   writeResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
		logical.DeleteOperation: &framework.PathOperation{
			Callback:                    b.configDelete,
			Summary:                     "Delete a config and drop its tokens, cached and stored.",
			DisplayAttrs:                attrs("delete"),
			Responses:                   deleteResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
	}
}

// configName is the config that a request is about.
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

// toResponseData is what a read may show: all but the client secret.
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

// persistsTokens reports whether the config's tokens are kept in storage. They are when the
// entry was stored before it could say so.
func (c *configEntry) persistsTokens() bool { return c.PersistTokens == nil || *c.PersistTokens }

// longest is how long a request to this engine waits for a token: request_timeout and a
// little less than a second, so that it is answered within that.
func (c *configEntry) longest() time.Duration { return c.RequestTimeout + 990*time.Millisecond }

// requestsPerSecond is the limit of the config's gate. An entry that was stored before
// there was one has the default.
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

// pruneConfig deletes the stored tokens of a config that was written, but those that
// stand. A failure is a warning: such tokens are never served.
func (b *backend) pruneConfig(ctx context.Context, name string, resp *logical.Response) {
	if b.tokens.pruneConfig(ctx, name) != nil {
		resp.AddWarning(fmt.Sprintf("Not all older tokens of config %q could be deleted from storage. They are not served any more, and the hourly sweep deletes them.", name))
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

// writeConfig verifies a config and saves it. The error is a problem when the user can
// solve it, and says nothing of which config it is.
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
		// Before update takes its lock, so that no other write waits for MojoAuth.
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
			return nil, problem("it was changed by somebody else at the same time. Read it and write again")
		}
		return config, nil
	})
	if err != nil {
		return nil, err
	}
	b.configSaved(ctx, name, old, config, resp)
	return unlessEmpty(resp), nil
}

// configSaved does what follows a write of a config that is in storage.
func (b *backend) configSaved(ctx context.Context, name string, old *held[configEntry], config *configEntry, resp *logical.Response) {
	b.telemetry.configSeen(name)
	if old != nil && (config.TokenGeneration != old.entry.TokenGeneration || old.entry.persistsTokens() && !config.persistsTokens()) {
		b.pruneConfig(ctx, name, resp)
	}
}

// sameClient reports whether both configs' tokens belong to the same client.
func (c *configEntry) sameClient(other *configEntry) bool {
	return c.TokenURL == other.TokenURL && c.ClientID == other.ClientID
}

// mergeConfig makes the config that old becomes with the fields that were sent,
// and checks the whole. Its error names the field and says how to mend it.
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
		// Compared as they are: two spellings of one host may turn out to be two.
		for _, field := range []struct{ name, was, becomes string }{
			{"token_url", old.entry.TokenURL, config.TokenURL},
			{"ca_cert", old.entry.CACert, config.CACert},
		} {
			if field.was != field.becomes {
				return nil, fmt.Errorf("%s changes: send client_secret in the same request, so someone who doesn't know the secret can't redirect it", field.name)
			}
		}
	}
	if old == nil || !old.entry.sameClient(&config) {
		config.TokenGeneration = rand.Text()
	}
	return &config, nil
}

// cutLineEnd takes away the line end of what was typed or is the last line of a file.
func cutLineEnd(text string) string {
	if line, ok := strings.CutSuffix(text, "\n"); ok {
		return strings.TrimSuffix(line, "\r")
	}
	return text
}

// validate checks the whole config.
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
			return fmt.Errorf("%s is required: send the one that MojoAuth shows for the application", field.name)
		}
		if strings.ContainsFunc(field.value, isControl) {
			return fmt.Errorf("%s holds a control character, often the line end of a file it was read from: send it without", field.name)
		}
	}
	switch c.TokenEndpointAuthMethod {
	case authMethodPost, authMethodBasic:
	default:
		return fmt.Errorf("token_endpoint_auth_method %q is not known: send %s or %s", c.TokenEndpointAuthMethod, authMethodPost, authMethodBasic)
	}
	if err := validateCACert(c.CACert); err != nil {
		return err
	}
	if c.RequestTimeout < minRequestTimeout || c.RequestTimeout > maxRequestTimeout {
		return fmt.Errorf("request_timeout %s is out of range: send %s to %s", c.RequestTimeout, minRequestTimeout, maxRequestTimeout)
	}
	if c.MaxRetries < 0 || c.MaxRetries > maxMaxRetries {
		return fmt.Errorf("max_retries %d is out of range: send 0 to %d", c.MaxRetries, maxMaxRetries)
	}
	if n := c.MaxRequestsPerSecond; n < 1 || n > maxMaxRequestsPerSecond {
		return fmt.Errorf("max_requests_per_second %d is out of range: send 1 to %d", n, maxMaxRequestsPerSecond)
	}
	return nil
}

func isControl(r rune) bool { return r < 0x20 || r == 0x7f }

// validateTokenURL accepts an https URL of any host, and http of a loopback
// host. The URL itself is not repeated in errors: it may hold a password.
func validateTokenURL(raw string) error {
	const example = "for example https://your-app.mojoauth.com/oauth2/token"
	if raw == "" {
		return errors.New("token_url is required: send the token endpoint's full URL, " + example)
	}
	if strings.ContainsFunc(hostIn(raw), func(r rune) bool { return r >= utf8.RuneSelf || r == '%' }) {
		return errors.New("token_url has a host that is not plain ASCII: send the host's ASCII form, in which each label beyond ASCII begins with xn--, and nothing percent-encoded")
	}
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" || u.Opaque != "" || strings.ContainsFunc(raw, func(r rune) bool { return r == ' ' || isControl(r) }) {
		return errors.New("token_url is not a full URL: send one without spaces, " + example)
	}
	switch {
	case !isHost(u):
		return errors.New("token_url has a host that is neither a name (letters, digits, -, _ and dots) nor an IP address: send the token endpoint's, " + example)
	case u.User != nil:
		return errors.New("token_url holds user information before an @: send it without; credentials belong in client_id and client_secret")
	case strings.Contains(raw, "#"):
		return errors.New("token_url holds a fragment (#): send it without")
	case u.Scheme == "https":
	case u.Scheme == "http" && isLoopback(u.Hostname()):
	case u.Scheme == "http":
		return errors.New("token_url is http, which would send the client secret unencrypted: send an https URL (http is accepted for a loopback host only)")
	default:
		return fmt.Errorf("token_url has the scheme %q: send an https URL, %s", u.Scheme, example)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("token_url has the port %q: send one from 1 to 65535, or none", port)
		}
	}
	return nil
}

// isHost tells whether a URL's host is a name or an IP address. url.Parse also takes
// hosts that nothing can be dialed at.
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

// hostIn is the host of a URL, with its port, as it is written there: url.Parse
// decodes it.
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
			return fmt.Errorf("ca_cert holds a PEM block of type %q: send certificates only", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("ca_cert holds a certificate that cannot be read: %w", err)
		}
		found++
	}
	if len(strings.TrimSpace(string(rest))) != 0 || (bundle != "" && found == 0) {
		return errors.New("ca_cert is not PEM: send certificates between BEGIN CERTIFICATE and END CERTIFICATE lines, from the CLI as ca_cert=@file.pem")
	}
	return nil
}

// verifyConnection asks for a token with the config and throws it away. A refusal
// that is about the request only, such as a scope being needed, shows that the
// credentials are good: that is a warning. The error is a problem, or the end of ctx.
func (b *backend) verifyConnection(ctx context.Context, name string, config *configEntry) (warning string, err error) {
	leave, err := b.verifications.enter(ctx, config.RequestTimeout)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, config.longest())
	defer cancel()
	waiting, cancel := context.WithTimeout(ctx, config.longest()-100*time.Millisecond) // to be told why
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		defer leave()
		ended <- b.tokens.tryOut(waiting, name, config)
	}()
	select {
	case err = <-ended:
	case <-ctx.Done(): // a client that is not well either
		err = ctx.Err()
	}
	var (
		failed *mintError
		late   *noTurnError
	)
	switch {
	case errors.As(err, &late):
		return "", problemf("trying it failed: %s, or send verify_connection=false to save it without asking MojoAuth", late.reason())
	case errors.Is(err, gate.ErrClosed):
		return "", problem("it was changed by somebody else at the same time. Read it and write again")
	case errors.Is(err, context.DeadlineExceeded):
		failed = &mintError{class: classTimeout, allowed: config.RequestTimeout}
	case !errors.As(err, &failed):
		return "", err
	case failed.acceptsClient():
		return fmt.Sprintf("MojoAuth accepted the client, but gave no token without audience and scopes: %s. Roles have to request what it allows.", failed), nil
	}
	return "", problemf("trying it failed: %s. %s, or send verify_connection=false to save it without asking MojoAuth", failed, failed.remedy())
}

// tryOut mints a token with a config that may be saved under that name, and throws it
// away. The error is that of minter.mint, or a *noTurnError when time is over.
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

// verificationPause is the least time between two verifications' beginnings.
const verificationPause = time.Second

// verifications go one at a time, and not faster than verificationPause: they may ask
// any host, with any secret, and leave no trace in storage.
type verifications struct {
	turn chan struct{} // has one place
	next time.Time     // when the next may begin; belongs to who holds the turn
}

func newVerifications() *verifications { return &verifications{turn: make(chan struct{}, 1)} }

// enter waits for a turn, at most for patience. leave has to be called after it.
func (v *verifications) enter(ctx context.Context, patience time.Duration) (leave func(), err error) {
	busy := problem("other configs are being tried, one at a time. Write again in a few seconds, or send verify_connection=false to save it without asking MojoAuth")
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
client ID and client secret. It is tried before it is saved, unless
verify_connection=false is sent.

Updates merge: a field that is not sent keeps its value. Changing token_url or
client_id, or deleting the config, drops every token cached or stored under it.
Changing anything else keeps them, so you can replace a client secret while tokens
go on being served. Any write ends a back-off after failures.

Each role's token is in Vault's storage too, so that it outlives the plugin's process.
persist_tokens=false deletes what is stored and keeps tokens in memory only; each node
then mints tokens of its own.

Bare "config" is "config/default". Listing "config/" gives the names of all.
`
