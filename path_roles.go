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

// This file is the path roles/<name>: what the tokens of a role are asked for.

const rolePrefix = "roles/"

// roleEntry is a role as it is stored.
type roleEntry struct {
	Config        string            `json:"config"`
	Audience      string            `json:"audience,omitempty"`
	Scopes        []string          `json:"scopes,omitempty"`
	ExtraParams   map[string]string `json:"extra_params,omitempty"`
	MinTTL        time.Duration     `json:"min_ttl,omitempty"` // nanoseconds
	MaxTTL        time.Duration     `json:"max_ttl,omitempty"` // nanoseconds
	GenerateLease bool              `json:"generate_lease,omitempty"`

	// TokenGeneration is random and changes with what tokens are asked for,
	// and when the role is rotated. Every node serves only tokens that were
	// minted under the generation that storage has.
	TokenGeneration string `json:"token_generation"`
}

// asksSameAs tells whether both roles' tokens are asked for in the same words.
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
			HelpSynopsis:    "Define what the tokens of a role are asked for.",
			HelpDescription: strings.TrimSpace(roleHelp),
		},
		// path-help takes the slash away.
		listPath(rolePrefix+"?$", "roles", "Read a role at roles/<name>, and a token of it at creds/<name>.", b.roles.list),
	}
}

func roleFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Name of the role, in lower case; its tokens are read from creds/<name>.",
		},
		"config": {
			Type:    framework.TypeString,
			Default: defaultConfigName,
			Description: `Name of the config whose application the tokens are for. It may be written
after the role.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Config", Value: defaultConfigName},
		},
		"audience": {
			Type: framework.TypeString,
			Description: `Audience (the API) that tokens are asked for, sent to MojoAuth as it is. None is
sent when it is empty. At most 2 KiB.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Audience"},
		},
		"scopes": {
			Type: framework.TypeCommaStringSlice,
			Description: `Scopes that tokens are asked for, separated by commas or spaces. Give a role no
more than its readers need. At most 100, and at most 4 KiB together.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"extra_params": {
			Type: framework.TypeKVPairs,
			Description: `Further form fields to send to the token endpoint, as name=value. They are not
secret: whoever may read the role sees them. At most 32, and at most 4 KiB
together, names and values.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Extra parameters"},
		},
		"min_ttl": {
			Type: framework.TypeDurationSecond,
			Description: `A read gets a token with at least this much life left, as far as the lifetime
that MojoAuth gives tokens allows (0.8 of it). In seconds or as a duration like
10m. 0, the default, leaves it to the engine: a quarter of the lifetime.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Minimum TTL"},
		},
		"max_ttl": {
			Type: framework.TypeDurationSecond,
			Description: `A token is served for at most this long after it was minted. It is also taken
as the lifetime of tokens that MojoAuth gives without one. In seconds or as a
duration like 1h. 0, the default, sets no limit.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum TTL"},
		},
		"generate_lease": {
			Type: framework.TypeBool,
			Description: `Give every read of the role a lease. A lease costs Vault storage writes and
revokes nothing, since MojoAuth cannot revoke a token; leave it off unless a
consumer needs one.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Generate lease"},
		},
	}
}

func (b *backend) roleOperations() map[logical.Operation]framework.OperationHandler {
	write := &framework.PathOperation{
		Callback:                    b.roleWrite,
		Summary:                     "Write a role. Fields that are not sent keep their values.",
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
					"config":         {Type: framework.TypeString, Required: true, Description: "Name of the config that tokens are minted with."},
					"audience":       {Type: framework.TypeString, Required: true, Description: "Audience that tokens are asked for."},
					"scopes":         {Type: framework.TypeStringSlice, Required: true, Description: "Scopes that tokens are asked for."},
					"extra_params":   {Type: framework.TypeKVPairs, Required: true, Description: "Further form fields that are sent."},
					"min_ttl":        {Type: framework.TypeInt64, Required: true, Description: "Least life, in seconds, of a token that is read."},
					"max_ttl":        {Type: framework.TypeInt64, Required: true, Description: "Longest time, in seconds, that a token is served."},
					"generate_lease": {Type: framework.TypeBool, Required: true, Description: "Whether reads get a lease."},
				},
			}}},
		},
		logical.RecoverOperation: &framework.PathOperation{
			Callback:                    b.roleWrite,
			Summary:                     "Recover a role from a loaded snapshot, and drop its cached tokens.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "recover"},
			Responses:                   writeResponse,
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		},
		logical.DeleteOperation: &framework.PathOperation{
			Callback:                    b.roleDelete,
			Summary:                     "Delete a role and drop its tokens, cached and stored.",
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
	// Copies, since what is held in memory must not be changed; and never nil,
	// since a list reads better as [] than as null.
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

// pruneRole deletes the stored token that a role had with a config before it was written.
// A failure is a warning: such a token is never served.
func (b *backend) pruneRole(ctx context.Context, config, role string, resp *logical.Response) {
	if b.tokens.pruneRole(ctx, config, role) != nil {
		resp.AddWarning(fmt.Sprintf("The older token of role %q could not be deleted from storage. It is not served any more, and the hourly sweep deletes it.", role))
	}
}

// roleWrite saves a role with the fields that were sent. When a role is recovered, these
// are all that the snapshot has of it, and nothing of the present one stays.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	resp := &logical.Response{}
	dropped := false
	old, err := b.roles.update(ctx, req.Storage, name, func(old *held[roleEntry]) (*roleEntry, error) {
		if !allowed(req.Operation, old != nil) {
			return nil, problem("it was changed by somebody else at the same time. Read it and write again")
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
			resp.AddWarning(fmt.Sprintf("config %q does not exist yet: write it at config/%s before reading creds/%s", role.Config, role.Config, name))
		}
		if role.MaxTTL > 0 && role.MinTTL > role.MaxTTL {
			resp.AddWarning(fmt.Sprintf("min_ttl %s is longer than max_ttl %s: no token can have that much life left", role.MinTTL, role.MaxTTL))
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

// mergeRole makes the role that old becomes with the fields that were sent, and
// checks the whole. Its error names the field and says how to mend it.
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
		return errors.New("audience holds a control character, often the line end of a file it was read from: send it without")
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
			return errors.New("extra_params holds a parameter without a name: send name=value")
		case slices.Contains([]string{"grant_type", "client_id", "client_secret"}, lower), strings.HasPrefix(lower, "client_assertion"):
			return fmt.Errorf("extra_params may not name %q: the config says who the client is and how tokens are asked for", name)
		case slices.Contains([]string{"scope", "audience"}, lower):
			return fmt.Errorf("extra_params may not name %q: send the field %s", name, map[string]string{"scope": "scopes", "audience": "audience"}[lower])
		}
	}
	return nil
}

// parseScopes reads scopes as they were sent, by a role's writer or in a query.
func parseScopes(sent []string) ([]string, error) {
	scopes := splitScopes(sent)
	return scopes, validateScopes(scopes)
}

// splitScopes takes scopes apart at commas and white space, and drops empty
// ones and duplicates. The order is kept.
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

// subsetOf tells whether all that are asked for are among the scopes. outside is the
// first that is not.
func subsetOf(scopes, asked []string) (outside string, ok bool) {
	have := make(map[string]struct{}, len(scopes))
	for _, scope := range scopes {
		have[scope] = struct{}{}
	}
	for _, scope := range asked {
		if _, ok := have[scope]; !ok {
			return scope, false
		}
	}
	return "", true
}

// validateScopes checks how many scopes there are, and the characters that one may
// have (RFC 6749 §3.3).
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
			return fmt.Errorf("scopes holds %q, which no scope may be: use visible ASCII characters without \" and \\", scope)
		}
	}
	return nil
}

// joinScopes makes the scope parameter of scopes (RFC 6749 §3.3).
func joinScopes(scopes []string) string { return strings.Join(scopes, " ") }

const roleHelp = `
A role says what its tokens are asked for: the config (the MojoAuth
application), the audience and the scopes. Whoever may read creds/<name> gets
such a token.

Updates merge: a field that is not sent keeps its value. Changing config,
audience, scopes or extra_params, or deleting the role, drops its tokens, in memory
and in storage. The other fields apply to tokens that are cached already. Writing the
same values again changes nothing.
`
