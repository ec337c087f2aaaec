// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file is where tokens are read, creds/<role>, and replaced before their
// time, rotate-role/<role>; and the type of the leases on them.

const (
	credsPrefix  = "creds/"
	rotatePrefix = "rotate-role/"

	// secretType is kept in every lease: it must not change.
	secretType = "mojoauth_access_token"
)

func (b *backend) pathCreds() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: credsPrefix + framework.GenericNameRegex("role") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "access-token",
			},
			Fields: map[string]*framework.FieldSchema{
				"role": {
					Type:        framework.TypeString,
					Required:    true,
					Description: "Name of the role to read an access token of.",
				},
				"scopes": {
					Type:  framework.TypeCommaStringSlice,
					Query: true,
					Description: `Some of the role's scopes, separated by commas or spaces, to get a token that
may do less. All of them when it is empty.`,
				},
				"min_ttl": {
					Type:  framework.TypeDurationSecond,
					Query: true,
					Description: `Life that the token should have left, when that is more than the role's min_ttl:
a new one is minted if need be. As far as the lifetime that MojoAuth gives
tokens allows (0.8 of it). In seconds or as a duration like 10m.`,
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				// Not forwarded: any node that may read serves from its own cache.
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.credsRead,
					Summary:      "Read an access token of a role.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      tokenFields(),
					}}},
				},
			},
			HelpSynopsis:    "Read an access token of a role.",
			HelpDescription: strings.TrimSpace(credsHelp),
		},
	}
}

func (b *backend) pathRotateRole() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: rotatePrefix + framework.GenericNameRegex("role") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "role",
			},
			Fields: map[string]*framework.FieldSchema{
				"role": {
					Type:        framework.TypeString,
					Required:    true,
					Description: "Name of the role whose token is to be replaced.",
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:     b.rotateRole,
					Summary:      "Mint a new token of a role now, and drop the older ones on every node.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "rotate"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      pick(tokenFields(), "last_vault_rotation", "expires_at", "expires_at_seconds"),
					}}},
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis:    "Replace the token of a role before its time.",
			HelpDescription: strings.TrimSpace(rotateHelp),
		},
	}
}

// secretToken is the type of leases on tokens, for roles with generate_lease. It
// stays known whatever roles say, so that every lease there is can be revoked.
func (b *backend) secretToken() *framework.Secret {
	return &framework.Secret{
		Type:   secretType,
		Fields: tokenFields(),
		// Nothing to do: MojoAuth cannot revoke a token, and the cached one
		// belongs to other readers too.
		Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		},
	}
}

// tokenFields describes what a read of creds/<role> answers.
func tokenFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"access_token": {
			Type:         framework.TypeString,
			Required:     true,
			Description:  "The access token, to be sent as a bearer token (RFC 6750).",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"token_type": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Type of the token, as MojoAuth tells it: Bearer, also when it tells none.",
		},
		"scope": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Scopes that were granted, separated by spaces.",
		},
		"expires_at": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When to stop using the token: RFC 3339, UTC.",
		},
		"expires_at_seconds": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "When to stop using the token: Unix time in seconds.",
		},
		"ttl": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds until the token should be read again. Not the token's life.",
		},
		"rotation_period": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds between two rotations of the token.",
		},
		"last_vault_rotation": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When the token was minted: RFC 3339, UTC.",
		},
	}
}

func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, how, err := b.readToken(ctx, req, d)
	b.telemetry.read(how)
	return resp, err
}

func (b *backend) readToken(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, outcome, error) {
	name := d.Get("role").(string)
	for {
		g, problem, err := b.grant(ctx, req.Storage, name)
		if err != nil {
			return nil, outcomeError, err
		}
		var minTTL time.Duration
		if problem == "" {
			minTTL, problem = narrow(g, d)
		}
		if problem != "" {
			return logical.ErrorResponse(problem), outcomeError, nil
		}
		answer, err := b.tokens.read(ctx, g, minTTL)
		if err == nil {
			return b.tokenResponse(g, minTTL, &answer), answer.outcome, nil
		}
		if !errors.Is(err, errOutdated) || ctx.Err() != nil {
			resp, err := mintFailure(name, err)
			return resp, outcomeError, err
		}
	}
}

// grant looks up what a role's token is asked for. problem is what keeps a user
// from getting one, with how to mend it.
func (b *backend) grant(ctx context.Context, s logical.Storage, name string) (g *grant, problem string, err error) {
	role, err := b.roles.get(ctx, s, name)
	if err != nil {
		return nil, "", err
	}
	if role == nil {
		return nil, fmt.Sprintf("role %q does not exist: create it by writing roles/%s, or list the roles there are at roles/", name, name), nil
	}
	config, err := b.configs.get(ctx, s, role.entry.Config)
	if err != nil {
		return nil, "", err
	}
	if config == nil {
		return nil, fmt.Sprintf("config %q, which role %q names, does not exist: create it by writing config/%s, or change the role's field config", role.entry.Config, name, role.entry.Config), nil
	}
	return &grant{role: role, config: config, scopes: role.entry.Scopes}, "", nil
}

// narrow takes the query of a read into g: fewer scopes, and the life that the
// token should have left. problem is what is wrong with the query.
func narrow(g *grant, d *framework.FieldData) (minTTL time.Duration, problem string) {
	minTTL = g.role.entry.MinTTL
	if asked, ok := d.GetOk("min_ttl"); ok {
		minTTL = max(minTTL, time.Duration(asked.(int))*time.Second)
	}
	sent, ok := d.GetOk("scopes")
	if !ok {
		return minTTL, ""
	}
	asked, err := parseScopes(sent.([]string))
	if err != nil {
		return 0, err.Error()
	}
	if outside, ok := subsetOf(g.role.entry.Scopes, asked); !ok {
		return 0, fmt.Sprintf("scopes holds %q, which role %q does not have: ask for some of %q, or for none to get all", outside, g.role.name, g.role.entry.Scopes)
	}
	if len(asked) == 0 || len(asked) == len(g.role.entry.Scopes) {
		return minTTL, "" // all of them, since neither holds one twice
	}
	slices.Sort(asked)
	g.scopes, g.narrowed = asked, joinScopes(asked)
	return minTTL, ""
}

// tokenResponse is the answer to a read of creds/<role>.
func (b *backend) tokenResponse(g *grant, minTTL time.Duration, answer *served) *logical.Response {
	same := &answer.common
	data := map[string]any{
		"access_token":        same.accessToken,
		"token_type":          same.tokenType,
		"scope":               same.scope,
		"expires_at":          same.expiresAt,
		"expires_at_seconds":  same.expiresAtSeconds,
		"ttl":                 answer.ttl,
		"rotation_period":     same.rotationPeriod,
		"last_vault_rotation": same.lastVaultRotation,
	}
	if answer.schedule != answer.cachedToken.schedule { // the reader's min_ttl counts
		data["rotation_period"] = answer.schedule.rotationPeriod()
	}
	resp := &logical.Response{Data: data}
	if g.role.entry.GenerateLease {
		resp = b.Secret(secretType).Response(data, nil)
		resp.Secret.TTL = answer.lease
	}
	if answer.left < minTTL {
		resp.AddWarning(shortLived(minTTL, answer))
	}
	if answer.assumed {
		resp.AddWarning(fmt.Sprintf("MojoAuth did not tell how long the token lives: %s is assumed. Set max_ttl of role %q to what it is.", assumedLifetime, g.role.name))
	}
	if len(answer.missing) > 0 {
		resp.AddWarning(fmt.Sprintf("MojoAuth granted fewer scopes than were asked for role %q: without %s.", g.role.name, joinScopes(answer.missing)))
	}
	return resp
}

// shortLived says why a token has less life left than the reader wants.
func shortLived(minTTL time.Duration, answer *served) string {
	text := fmt.Sprintf("The token has %s left, less than the min_ttl of %s: ", answer.left.Round(time.Second), minTTL)
	switch {
	case answer.failure != nil:
		return text + "no new one could be had: " + answer.failure.Error() + "."
	case answer.outcome == outcomeStale:
		return text + "a new one is being minted, but MojoAuth is slow."
	default:
		return text + fmt.Sprintf("its whole lifetime is %s, and one that has more than %s left is not replaced.", answer.schedule.lifetime, answer.schedule.refresh)
	}
}

// missingScopes are those asked for that were not granted.
func missingScopes(asked []string, granted string) []string {
	if granted == joinScopes(asked) {
		return nil
	}
	have := strings.Fields(granted)
	return slices.DeleteFunc(slices.Clone(asked), func(scope string) bool { return slices.Contains(have, scope) })
}

func (b *backend) rotateRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("role").(string)
	for {
		g, problem, err := b.grant(ctx, req.Storage, name)
		if err != nil {
			return nil, err
		}
		if problem != "" {
			return logical.ErrorResponse(problem), nil
		}
		tok, err := b.tokens.mintNow(ctx, g)
		if errors.Is(err, errOutdated) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return mintFailure(name, err)
		}
		return b.rotateTo(ctx, req.Storage, g, tok)
	}
}

// rotateTo makes tok, which was minted for g, the token of g's role on this node,
// and has all nodes drop the older ones: the new generation in the role's entry
// reaches them as any write does.
func (b *backend) rotateTo(ctx context.Context, s logical.Storage, g *grant, tok *token) (*logical.Response, error) {
	b.roles.writing.Lock()
	defer b.roles.writing.Unlock()
	now, problem, err := b.grant(ctx, s, g.role.name)
	if err != nil {
		return nil, err
	}
	if problem != "" {
		return logical.ErrorResponse(problem), nil
	}
	if !now.role.entry.asksSameAs(&g.role.entry) || now.config.entry.TokenGeneration != g.config.entry.TokenGeneration {
		return logical.ErrorResponse("role %q or its config was changed while the new token was minted, which dropped the older tokens too: rotate again if that is not enough", g.role.name), nil
	}
	next, failure := b.tokens.successor(now, tok)
	if failure != nil {
		return mintFailure(g.role.name, failure)
	}
	entry := now.role.entry
	entry.TokenGeneration = rand.Text()
	if now.role, err = b.roles.put(ctx, s, g.role.name, entry); err != nil {
		b.tokens.roleChanged(g.role.name)
		return nil, err
	}
	cached, err := b.tokens.put(now, next)
	if err != nil {
		return nil, err
	}
	// The slot that was put into has the new generation; those of narrowed scopes
	// have not.
	b.tokens.drop(func(g *grant) bool {
		return g.role.name == now.role.name && g.role.entry.TokenGeneration != entry.TokenGeneration
	})
	return &logical.Response{Data: map[string]any{
		"last_vault_rotation": cached.common.lastVaultRotation,
		"expires_at":          cached.common.expiresAt,
		"expires_at_seconds":  cached.common.expiresAtSeconds,
	}}, nil
}

// mintFailure is how a read that got no token is answered: 400 for what MojoAuth
// refused, 504 when it gave no answer in time, and 502 for other faults of its.
//
// A CodedError has to be the outermost error: wrapped, it reaches Vault as 500.
func mintFailure(role string, err error) (*logical.Response, error) {
	var failure *unavailable
	if !errors.As(err, &failure) {
		return nil, err
	}
	text := fmt.Sprintf("no token for role %q: %s. %s.", role, failure, failure.remedy())
	switch {
	case failure.refused():
		return logical.ErrorResponse(text), nil
	case failure.class == classTimeout:
		return nil, logical.CodedError(http.StatusGatewayTimeout, text)
	default:
		return nil, logical.CodedError(http.StatusBadGateway, text)
	}
}

const credsHelp = `
The token is valid for a while yet: at least a tenth of its lifetime or a
minute, whichever is less, and usually a quarter or more. It comes from a cache
in memory when there is one, and is minted by MojoAuth when there is none.

When there is no token that may be served and none can be had, the answer is 400
if MojoAuth refused, 504 if it gave no answer in time, and else 502; it says what
failed and when the next try is.

Read again after "ttl" seconds. The engine has the next token ready by then.

The answer has a lease only when the role says generate_lease. Revoking it does
not end the token, which MojoAuth cannot do: it stays valid until "expires_at".
`

const rotateHelp = `
A new token is minted at once, whatever is cached and whatever failed before; only
while MojoAuth has asked to be left alone by Retry-After is it not asked. Then the
role's older tokens are dropped on every node, and reads get the new one. When no
new token can be had, nothing is dropped and the error is told.

The older tokens stay valid until they end: MojoAuth cannot revoke them.
`
