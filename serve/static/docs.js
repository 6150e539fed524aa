// Swagger UI over this server's own description of its API. A file and not a script in the page:
// the CSP forbids those.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  persistAuthorization: false, // a key ends with the page
  validatorUrl: null, // or it would send this server's address to swagger.io
});
