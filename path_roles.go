// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file is the path roles/<name>: which tokens a role's readers get.

const rolePrefix = "roles/"

// roleEntry is a role as stored.
type roleEntry struct {
	Config        string            `json:"config"`
	Audience      string            `json:"audience,omitempty"`
	Scopes        []string          `json:"scopes,omitempty"`
	ExtraParams   map[string]string `json:"extra_params,omitempty"`
	MinTTL        time.Duration     `json:"min_ttl,omitempty"` // nanoseconds
	MaxTTL        time.Duration     `json:"max_ttl,omitempty"` // nanoseconds
	GenerateLease bool              `json:"generate_lease,omitempty"`

	// TokenGeneration is random. It changes with the token request and when the role is
	// rotated. A node serves only tokens minted under the generation in storage.
	TokenGeneration string `json:"token_generation"`
}

// asksSameAs reports whether both roles make the same token request.
func (r *roleEntry) asksSameAs(other *roleEntry) bool {
	return r.Config == other.Config &&
		r.Audience == other.Audience &&
		slices.Equal(r.Scopes, other.Scopes) &&
		maps.Equal(r.ExtraParams, other.ExtraParams)
}

func (b *backend) pathRoles() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: rolePrefix + framework.GenericNameRegex("name") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "role",
			},
			Fields:          roleFields(),
			ExistenceCheck:  b.roleExists,
			Operations:      b.roleOperations(),
			HelpSynopsis:    "Define the tokens that a role's readers get.",
			HelpDescription: strings.TrimSpace(roleHelp),
		},
		// path-help removes the slash.
		listPath(rolePrefix+"?$", "roles", "Read a role at roles/<name>, and its access token at creds/<name>.", b.roles.list),
	}
}

func roleFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Name of the role, in lower case. Readers get its tokens from creds/<name>.",
		},
		"config": {
			Type:         framework.TypeString,
			Default:      defaultConfigName,
			Description:  `Name of the config to mint tokens with. You may write the config after the role.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Config", Value: defaultConfigName},
		},
		"audience": {
			Type: framework.TypeString,
			Description: `Audience to request tokens for, usually the API's identifier. Sent to MojoAuth
unchanged; omitted if empty. At most 2 KiB.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Audience"},
		},
		"scopes": {
			Type: framework.TypeCommaStringSlice,
			Description: `Scopes to request, separated by commas or spaces. Give a role only the scopes that
its readers need. At most 100 scopes, and at most 4 KiB in total.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"extra_params": {
			Type: framework.TypeKVPairs,
			Description: `Additional form parameters to send to the token endpoint, as name=value. They are
not secret: reading the role shows them. At most 32 parameters, and at most 4 KiB of
names and values in total.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Extra parameters"},
		},
		"min_ttl": {
			Type: framework.TypeDurationSecond,
			Description: `Minimum time left of a token when it is read, honored up to 0.8 of the token's
lifetime. A number of seconds or a duration such as 10m. With 0, the default, the
engine renews a token when a quarter of its lifetime is left.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Minimum TTL"},
		},
		"max_ttl": {
			Type: framework.TypeDurationSecond,
			Description: `Maximum time to serve a token after it was minted. Also the lifetime of a token
for which MojoAuth reports none. A number of seconds or a duration such as 1h. 0, the
default, sets no limit.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum TTL"},
		},
		"generate_lease": {
			Type: framework.TypeBool,
			Description: `Whether each read of the role creates a lease. A lease costs Vault storage writes,
and revoking it does not revoke the token, because MojoAuth cannot. Leave this off
unless a consumer requires leases.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Generate lease"},
		},
	}
}

func (b *backend) roleOperations() map[logical.Operation]framework.OperationHandler {
	write := &framework.PathOperation{
		Callback:                    b.roleWrite,
		Summary:                     "Write a role. Omitted fields keep their values.",
		DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "write"},
		Responses:                   writeResponse,
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return map[logical.Operation]framework.OperationHandler{
		logical.CreateOperation: write,
		logical.UpdateOperation: write,
		logical.ReadOperation: &framework.PathOperation{
			Callback:     b.roleRead,
			Summary:      "Read a role.",
			DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
			Responses: map[int][]framework.Response{http.StatusOK: {{
				Description: "OK",
				Fields: map[string]*framework.FieldSchema{
					"config":         {Type: framework.TypeString, Required: true, Description: "Name of the config to mint tokens with."},
					"audience":       {Type: framework.TypeString, Required: true, Description: "Audience to request tokens for."},
					"scopes":         {Type: framework.TypeStringSlice, Required: true, Description: "Scopes to request."},
					"extra_params":   {Type: framework.TypeKVPairs, Required: true, Description: "Additional form parameters to send."},
					"min_ttl":        {Type: framework.TypeInt64, Required: true, Description: "Minimum time left of a token when it is read, in seconds."},
					"max_ttl":        {Type: framework.TypeInt64, Required: true, Description: "Maximum time to serve a token, in seconds."},
					"generate_lease": {Type: framework.TypeBool, Required: true, Description: "Whether each read creates a lease."},
				},
			}}},
		},
		logical.RecoverOperation: &framework.PathOperation{
			Callback:                    b.roleWrite,
			Summary:                     "Recover a role from a loaded snapshot and drop its tokens.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "recover"},
			Responses:                   writeResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
		logical.DeleteOperation: &framework.PathOperation{
			Callback:                    b.roleDelete,
			Summary:                     "Delete a role and drop its cached and stored tokens.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "delete"},
			Responses:                   deleteResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
	}
}

func (b *backend) roleExists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	role, err := b.roles.get(ctx, req.Storage, d.Get("name").(string))
	return role != nil, err
}

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	role, err := b.roles.shown(ctx, req, d.Get("name").(string))
	if err != nil || role == nil {
		return nil, err
	}
	return &logical.Response{Data: role.entry.toResponseData()}, nil
}

func (r *roleEntry) toResponseData() map[string]any {
	// These are copies because entries in memory must not change. They are never nil
	// because an empty list should be [], not null.
	scopes := append([]string{}, r.Scopes...)
	extra := make(map[string]string, len(r.ExtraParams))
	maps.Copy(extra, r.ExtraParams)
	return map[string]any{
		"config":         r.Config,
		"audience":       r.Audience,
		"scopes":         scopes,
		"extra_params":   extra,
		"min_ttl":        int64(r.MinTTL / time.Second),
		"max_ttl":        int64(r.MaxTTL / time.Second),
		"generate_lease": r.GenerateLease,
	}
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	old, err := b.roles.remove(ctx, req.Storage, name)
	if err != nil || old == nil {
		return nil, err
	}
	resp := &logical.Response{}
	b.pruneRole(ctx, old.entry.Config, name, resp)
	return unlessEmpty(resp), nil
}

// pruneRole deletes the stored token that a role had with a config before a write. A
// failure is a warning only, because such a token is never served.
func (b *backend) pruneRole(ctx context.Context, config, role string, resp *logical.Response) {
	if b.tokens.pruneRole(ctx, config, role) != nil {
		resp.AddWarning(fmt.Sprintf("The older token of role %q could not be deleted from storage. It is no longer served, and the hourly sweep deletes it.", role))
	}
}

// roleWrite saves a role with the fields of the request. For a recovery, these are all the
// fields of the snapshot's role, and they replace the current role entirely.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	resp := &logical.Response{}
	dropped := false
	old, err := b.roles.update(ctx, req.Storage, name, func(old *held[roleEntry]) (*roleEntry, error) {
		if !allowed(req.Operation, old != nil) {
			return nil, errChanged
		}
		base := old
		if req.Operation == logical.RecoverOperation {
			base = nil
		}
		role, err := mergeRole(base, d)
		if err != nil {
			return nil, problem(err.Error())
		}
		config, err := b.configs.get(ctx, req.Storage, role.Config)
		if err != nil {
			return nil, err
		}
		if config == nil {
			resp.AddWarning(fmt.Sprintf("The config %q does not exist yet. Write config/%s before you read creds/%s.", role.Config, role.Config, name))
		}
		if role.MaxTTL > 0 && role.MinTTL > role.MaxTTL {
			resp.AddWarning(fmt.Sprintf("The min_ttl of %s is longer than the max_ttl of %s. No token can have that much time left.", role.MinTTL, role.MaxTTL))
		}
		dropped = old != nil && role.TokenGeneration != old.entry.TokenGeneration
		return role, nil
	})
	var mistake problem
	if errors.As(err, &mistake) {
		return logical.ErrorResponse("role %q was not saved: %s", name, mistake), nil
	}
	if err != nil {
		return nil, err
	}
	if dropped {
		b.pruneRole(ctx, old.entry.Config, name, resp)
	}
	return unlessEmpty(resp), nil
}

// mergeRole returns old with the fields of the request merged in, and validates the
// result. Its error names the field and says how to fix it.
func mergeRole(old *held[roleEntry], d *framework.FieldData) (*roleEntry, error) {
	role := roleEntry{Config: defaultConfigName}
	if old != nil {
		role = old.entry
	}

	if v, ok := d.GetOk("config"); ok {
		role.Config = v.(string)
		if role.Config == "" {
			role.Config = defaultConfigName
		}
	}
	if v, ok := d.GetOk("audience"); ok {
		role.Audience = v.(string)
	}
	if v, ok := d.GetOk("scopes"); ok {
		role.Scopes = splitScopes(v.([]string))
	}
	if v, ok := d.GetOk("extra_params"); ok {
		role.ExtraParams = v.(map[string]string)
	}
	if v, ok := d.GetOk("min_ttl"); ok {
		role.MinTTL = time.Duration(v.(int)) * time.Second
	}
	if v, ok := d.GetOk("max_ttl"); ok {
		role.MaxTTL = time.Duration(v.(int)) * time.Second
	}
	if v, ok := d.GetOk("generate_lease"); ok {
		role.GenerateLease = v.(bool)
	}

	if err := role.validate(); err != nil {
		return nil, err
	}
	if old == nil || !role.asksSameAs(&old.entry) {
		role.TokenGeneration = rand.Text()
	}
	return &role, nil
}

func (r *roleEntry) validate() error {
	if err := validateName("config", r.Config); err != nil {
		return err
	}
	if err := checkText("audience", r.Audience); err != nil {
		return err
	}
	if err := validateScopes(r.Scopes); err != nil {
		return err
	}
	if strings.ContainsFunc(r.Audience, isControl) {
		return errors.New("audience contains a control character (often a trailing newline); remove it")
	}
	size := 0
	for name, value := range r.ExtraParams {
		size += len(name) + len(value)
	}
	if err := boundOf("extra_params").exceeded("extra_params", size, len(r.ExtraParams)); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(r.ExtraParams)) {
		lower := strings.ToLower(name)
		switch {
		case name == "":
			return errors.New("extra_params contains a parameter without a name; send name=value")
		case slices.Contains([]string{"grant_type", "client_id", "client_secret"}, lower), strings.HasPrefix(lower, "client_assertion"):
			return fmt.Errorf("extra_params must not contain %q, which the config determines; remove it", name)
		case slices.Contains([]string{"scope", "audience"}, lower):
			return fmt.Errorf("extra_params must not contain %q; use the field %s", name, map[string]string{"scope": "scopes", "audience": "audience"}[lower])
		}
	}
	return nil
}

// parseScopes parses and validates the scopes of a role or a query.
func parseScopes(sent []string) ([]string, error) {
	scopes := splitScopes(sent)
	return scopes, validateScopes(scopes)
}

// splitScopes splits scopes at commas and white space, and drops empty scopes and
// duplicates. It keeps the order.
func splitScopes(given []string) []string {
	var scopes []string
	seen := make(map[string]struct{})
	for _, s := range given {
		for scope := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' || r == '\r' }) {
			if _, twice := seen[scope]; !twice {
				seen[scope] = struct{}{}
				scopes = append(scopes, scope)
			}
		}
	}
	return scopes
}

// subsetOf reports whether all requested scopes are among the scopes. outside is the
// first that is not.
func subsetOf(scopes, requested []string) (outside string, ok bool) {
	have := make(map[string]struct{}, len(scopes))
	for _, scope := range scopes {
		have[scope] = struct{}{}
	}
	for _, scope := range requested {
		if _, ok := have[scope]; !ok {
			return scope, false
		}
	}
	return "", true
}

// validateScopes checks the number of scopes, their total size, and their characters
// (RFC 6749 §3.3).
func validateScopes(scopes []string) error {
	size := 0
	for _, scope := range scopes {
		size += len(scope)
	}
	if err := boundOf("scopes").exceeded("scopes", size, len(scopes)); err != nil {
		return err
	}
	for _, scope := range scopes {
		if strings.ContainsFunc(scope, func(r rune) bool { return r < 0x21 || r > 0x7e || r == '"' || r == '\\' }) {
			return fmt.Errorf("scopes contains %q, which is not a valid scope; use visible ASCII characters except \" and \\", scope)
		}
	}
	return nil
}

// joinScopes returns the value of the scope parameter (RFC 6749 §3.3).
func joinScopes(scopes []string) string { return strings.Join(scopes, " ") }

const roleHelp = `
A role defines a token request: the config (the MojoAuth application), the audience,
and the scopes. Clients that may read creds/<name> get such a token.

Updates merge: omitted fields keep their values. Changing config, audience, scopes, or
extra_params, or deleting the role, drops its cached and stored tokens. The other fields
also apply to tokens that are already cached. Writing the same values again changes
nothing.
`
